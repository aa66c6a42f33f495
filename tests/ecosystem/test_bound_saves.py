"""What a bound model's own save_pretrained writes, and who loads it: a Trainer, PEFT, transformers,
sentence-transformers, diffusers.
"""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.utils._pytree as pytree
from families import FAMILIES, IDS
from helpers import close, leaves, moved
from torch import Tensor, nn
from trainers import trainer

import lora_lite_func as ll

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CONFIGS: dict[str, ll.AdapterConfig] = {
    "lora": ll.LoRAConfig(r=4),
    "pissa": ll.PiSSAConfig(r=2),
    "vera": ll.VeRAConfig(r=8),  # its sites share frozen tensors
    "loreft": ll.LoReFTConfig(r=2, target_names=r"layers\.\d$"),  # PEFT has no form for it
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small model that was loaded from a folder, as PEFT's files name it."""
    folder = tmp_path_factory.mktemp("base")
    made: Any = FAMILIES["qwen3"].fresh()
    made.save_pretrained(folder)
    return type(made).from_pretrained(folder).eval()


def bound_to(base: Any, cfg: ll.AdapterConfig, seed: int = 0) -> Any:
    return ll.bind(base, ll.init(base, cfg, seed=seed))


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(s, t) for s, t in zip(leaves(a), leaves(b), strict=True))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


# --------------------------------------------------------------------------------------- a Trainer
@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_is_the_adapter_alone_and_a_run_resumes_from_it(
    base: Any, name: str, tmp_path: Path
) -> None:
    whole = bound_to(base, CONFIGS[name])
    trainer(whole, tmp_path).train()
    checkpoint = tmp_path / "checkpoint-2"
    sizes = [entry.stat().st_size for entry in checkpoint.glob("*.safetensors")]
    assert max(sizes) < sum(p.nbytes for p in base.parameters()) / 2
    in_pefts_form = {"adapter_config.json", "adapter_model.safetensors"} <= names_in(checkpoint)
    assert in_pefts_form == (name != "loreft")
    # another start: everything that matters comes from the checkpoint
    resumed = bound_to(base, CONFIGS[name], seed=5)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert same(ll.unbind(resumed), ll.unbind(whole))
    assert same(ll.load(tmp_path / "checkpoint-4", base), ll.unbind(whole))


def test_the_best_checkpoint_is_loaded_at_the_end(base: Any, tmp_path: Path) -> None:
    bound = bound_to(base, CONFIGS["lora"])
    settings = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_total_limit": 1,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # the first one is the best: its loss is the largest
    }
    run = trainer(bound, tmp_path, **settings)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    assert same(ll.load(best), ll.unbind(bound))


# ------------------------------------------------------------------------------------ other loaders
@pytest.mark.parametrize("name", ["lora", "pissa"])
def test_peft_and_transformers_load_it(base: Any, name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    params = moved(ll.init(base, CONFIGS[name]))
    bound: Any = ll.bind(base, params)
    bound.save_pretrained(tmp_path)
    expected = logits(bound)
    assert (expected - logits(base)).abs().max() > 1e-3
    assert "config.json" not in names_in(tmp_path)
    says = json.loads((tmp_path / "adapter_config.json").read_text())
    assert says["base_model_name_or_path"] == base.config._name_or_path
    auto = transformers.AutoModelForCausalLM
    found = {
        "peft": peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path),
        "peft's auto": peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path),
        "auto": auto.from_pretrained(tmp_path),
        "class": type(base).from_pretrained(tmp_path),
        "ours": ll.bind(base, ll.from_peft(tmp_path, base)),
    }
    for model in found.values():
        close(logits(model), expected, 1e-5)
    again: Any = ll.bind(base, ll.init(base, CONFIGS[name], seed=7))
    file = safetensors.torch.load_file(tmp_path / "model.safetensors")
    loaded = again.load_state_dict(file)
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize(
    ("cfg", "field"),
    [
        (ll.MiCAConfig(r=2), "init_lora_weights"),
        (ll.BDLoRAConfig(r=4, blocks_A=2, blocks_B=1), "use_bdlora"),
    ],
    ids=["mica", "bdlora"],
)
def test_peft_goes_on_with_the_same_method(
    base: Any, cfg: ll.AdapterConfig, field: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    bound: Any = ll.bind(base, moved(ll.init(base, cfg)))
    bound.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())[field]
    expected = logits(bound)
    assert (expected - logits(base)).abs().max() > 1e-3
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    close(logits(theirs), expected, 1e-5)
    learned = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert learned == ll.num_params(ll.unbind(bound))


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_takes_it_for_the_model(
    base: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound_to(base, CONFIGS[name]).save_pretrained(tmp_path)
    modules = ("transformers.models.auto.auto_factory", "transformers.integrations.peft")
    for module in modules:  # as where PEFT isn't installed
        monkeypatch.setattr(f"{module}.is_peft_available", lambda: False)
    with pytest.raises((OSError, ValueError, RuntimeError), match=r"model_type|mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for cls in (type(base), type(base.model)):
        with pytest.raises(RuntimeError, match="mismatch"):
            cls.from_pretrained(tmp_path, config=copy.deepcopy(base.config))


def test_one_without_a_name_is_no_bare_base(tmp_path: Path) -> None:
    made: Any = FAMILIES["qwen3"].fresh()
    bound_to(made, CONFIGS["lora"]).save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError, TypeError), match=r"."):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


# --------------------------------------------------------------------------- which module, whose
def test_a_model_inside_writes_what_is_inside_it(base: Any, tmp_path: Path) -> None:
    bound: Any = ll.bind(base, moved(ll.init(base, CONFIGS["lora"])))
    bound.model.save_pretrained(tmp_path)
    inner = ll.load(tmp_path, base.model)
    assert "layers.0.self_attn.q_proj" in inner
    with torch.no_grad():
        expected = bound.model(IDS).last_hidden_state
        close(ll.apply(base.model, inner, IDS).last_hidden_state, expected, 1e-6)
        theirs = ll.from_peft(tmp_path, base.model)
        close(ll.apply(base.model, theirs, IDS).last_hidden_state, expected, 1e-5)


def test_copies_write_their_own(base: Any, tmp_path: Path) -> None:
    bound: Any = ll.bind(base, moved(ll.init(base, CONFIGS["lora"])))
    copies = [copy.deepcopy(bound), pickle.loads(pickle.dumps(bound)), ll.reference(bound)]
    before = ll.unbind(copy.deepcopy(bound))
    with torch.no_grad():
        for p in bound.parameters():
            if p.requires_grad:
                p.add_(1.0)
    for i, other in enumerate(copies):
        other.save_pretrained(tmp_path / str(i))
        assert same(ll.load(tmp_path / str(i)), before)
    bound.save_pretrained(tmp_path / "bound")
    assert same(ll.load(tmp_path / "bound"), ll.unbind(bound))


def test_several_adapters_are_all_written(base: Any, tmp_path: Path) -> None:
    first = moved(ll.init(base, ll.LoRAConfig(r=2, target_names=("q_proj",))))
    second = moved(ll.init(base, ll.IA3Config(target_names=("v_proj",))))
    bound: Any = ll.bind(ll.bind(base, first), second)
    bound.save_pretrained(tmp_path)
    assert same(ll.load(tmp_path), (first, second))
    other: Any = ll.bind(base, (ll.init(base, first.config), ll.init(base, second.config)))
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert same(ll.unbind(other), (first, second))


def test_a_stack_for_rows_is_written_whole_or_in_part(base: Any, tmp_path: Path) -> None:
    """PEFT has no form for a stack, whose members may differ in rank."""
    members = [moved(ll.init(base, ll.LoRAConfig(r=r)), r) for r in (2, 4)]
    stack = ll.stack(members)
    bound: Any = ll.bind(base, ll.rows(stack, [0, 1]))
    bound.save_pretrained(tmp_path / "whole")
    assert same(ll.load(tmp_path / "whole", base), stack)
    bound.model.save_pretrained(tmp_path / "inner")
    inner = ll.load(tmp_path / "inner", base.model, member=0)
    assert torch.equal(inner["layers.0.mlp.up_proj", "lora_A"], members[0][UP, "lora_A"])


UP = "model.layers.0.mlp.up_proj"


def test_a_gathered_state_is_what_is_written(base: Any, tmp_path: Path) -> None:
    """As FSDP's full state dict, which one process has."""
    bound = bound_to(base, CONFIGS["lora"])
    gathered = {key: t + 1 for key, t in bound.state_dict().items()}
    other = tmp_path / "of another process"
    bound.save_pretrained(other, is_main_process=False, state_dict={})
    assert not other.exists()
    bound.save_pretrained(tmp_path, state_dict=gathered)
    wanted = [t + 1 for t in leaves(ll.unbind(bound))]
    assert all(torch.equal(a, b) for a, b in zip(leaves(ll.load(tmp_path)), wanted, strict=True))
    # as torch.compile's module calls them
    state = {f"_orig_mod.{key}": t for key, t in gathered.items()}
    bound.save_pretrained(tmp_path, state_dict=state)
    assert same(ll.load(tmp_path), ll.unbind(bound))


def test_a_file_that_lacks_a_tensor_is_no_adapter(base: Any, tmp_path: Path) -> None:
    bound = bound_to(base, CONFIGS["lora"])
    bound.save_pretrained(tmp_path)
    file = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del file["model.layers.0.self_attn.q_proj.lora_B"]
    with pytest.raises(RuntimeError, match=r"lacks 'model\.layers\.0\.self_attn\.q_proj\.lora_B"):
        bound.load_state_dict(file, strict=False)


def test_a_state_may_have_frozen_tensors_of_each_site(base: Any) -> None:
    """Sites of a new VeRA share their projections; those of one from elsewhere needn't."""
    shared = ll.init(base, CONFIGS["vera"])
    own = pytree.tree_map(lambda t: t + torch.rand_like(t) / 10, shared)
    bound: Any = ll.bind(base, shared)
    before = pytree.tree_map(torch.clone, shared)
    bound.load_state_dict(ll.bind(base, own).state_dict())
    assert same(ll.unbind(bound), own)
    assert torch.equal(logits(bound), logits(ll.bind(base, own)))
    again: Any = ll.bind(base, ll.init(base, CONFIGS["vera"], seed=4))
    again.load_state_dict(ll.bind(base, before).state_dict())
    assert same(ll.unbind(again), before)
    memories = {t.data_ptr() for name, t in again.named_buffers() if "vera_A" in name}
    assert len(memories) < sum("vera_A" in name for name, _ in again.named_buffers())


def test_pushing_goes_by_the_models_own_push(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[Any] = []

    def push_to_hub(self: Any, repo_id: str, private: bool | None = None) -> None:
        pushed.append((repo_id, private))

    bound = bound_to(base, CONFIGS["lora"])
    monkeypatch.setattr(type(base), "push_to_hub", push_to_hub)
    settings = {"private": True, "safe_serialization": False, "max_shard_size": "1GB"}
    bound.save_pretrained(tmp_path / "mine", push_to_hub=True, **settings)
    bound.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/ours")
    assert pushed == [("mine", True), ("me/ours", None)]


# ----------------------------------------------------------------------------- what is there before
def test_a_folder_with_a_whole_model_is_left_alone(base: Any, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path)
    before = {entry: entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(ll.CheckpointError, match=r"holds a whole model \(model\.safetensors\)"):
        bound_to(base, CONFIGS["lora"]).save_pretrained(tmp_path)
    assert {entry: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_what_a_bound_model_wrote_before_is_replaced(base: Any, tmp_path: Path) -> None:
    old = bound_to(base, CONFIGS["lora"])
    type(base).save_pretrained(old, tmp_path)  # with all tensors, as before 0.2.0
    assert "config.json" in names_in(tmp_path)
    for name in ("loreft", "lora", "loreft"):
        bound_to(base, CONFIGS[name]).save_pretrained(tmp_path)
        assert ("adapter_config.json" in names_in(tmp_path)) == (name == "lora")
        assert ("adapter_model.safetensors" in names_in(tmp_path)) == (name == "lora")
        assert ("config.json" in names_in(tmp_path)) == (name == "loreft")
        assert ll.load(tmp_path).config == CONFIGS[name]


# ------------------------------------------------------------------------------------ other tools
def test_sentence_transformers_saves_and_loads_it(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("peft")
    folder = tmp_path / "base"
    FAMILIES["bert"].fresh().save_pretrained(folder)  # type: ignore[operator]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1")
    tokenizer.save_pretrained(folder)
    encoder = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    bound: Any = ll.bind(encoder, moved(ll.init(encoder, ll.LoRAConfig(r=2)), size=0.5)).eval()
    y = bound.encode(["w3 w4 w5"], convert_to_tensor=True)
    assert (y - encoder.encode(["w3 w4 w5"], convert_to_tensor=True)).abs().max() > 1e-3
    bound.save_pretrained(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    close(again.encode(["w3 w4 w5"], convert_to_tensor=True), y, 1e-5)
    # as its Trainer resumes
    other: Any = ll.bind(encoder, ll.init(encoder, ll.LoRAConfig(r=2), seed=3))
    other.load_state_dict(again.state_dict())
    assert same(ll.unbind(other), ll.unbind(bound))
    unlike: Any = ll.bind(encoder, ll.init(encoder, ll.PiSSAConfig(r=2)))
    with pytest.raises(RuntimeError, match=r"PEFT's layers doesn't give .* what ll\.load reads"):
        unlike.load_state_dict(again.state_dict())


def test_diffusers_models_write_it_too(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model: Any = FAMILIES["unet"].fresh()
    assert isinstance(model, diffusers.ModelMixin)
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    bound: Any = ll.bind(model, params)
    bound.save_pretrained(tmp_path)
    assert same(ll.load(tmp_path, model), params)
    assert list(ll.from_peft(tmp_path, model)) == list(params)
    with pytest.raises(OSError, match=r"config\.json"):
        type(model).from_pretrained(tmp_path)


def test_a_module_of_huggingface_hub(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Small(nn.Module, hub.PyTorchModelHubMixin):  # type: ignore[name-defined]
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.up = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.up(x)
            return y

    model = Small()
    params = moved(ll.init(model, ll.LoRAConfig(r=2, target_names=("up",))))
    bound: Any = ll.bind(model, params)
    bound.save_pretrained(tmp_path)
    assert same(ll.load(tmp_path, model), params)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Small.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_a_head_trained_whole_is_saved_beside_the_adapter(base: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    head = ll.init(base, ll.FullConfig(target_parameters=(r"^lm_head\.",)))
    bound: Any = ll.bind(base, (head, ll.init(base, ll.LoRAConfig(r=4))))
    trainer(bound, tmp_path).train()
    right = logits(bound)
    said = json.loads((tmp_path / "checkpoint-4/adapter_config.json").read_text())
    assert "lm_head" in said["modules_to_save"]
    made = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "checkpoint-4")
    close(logits(made), right, 1e-5)
