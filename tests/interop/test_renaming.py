"""Files of models whose modules have moved since: by the user's word, and by themselves."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import close, normal
from peft_models import IDS, load_file, peft
from torch import Tensor, nn

import lora_lite_func as ll
from lora_lite_func.cli.main import main

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::peft", "ignore:::torch")

TEXT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class Inner(nn.Module):
    """A language model's layers and, beside them, a picture's."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"q_proj": nn.Linear(6, 6), "o_proj": nn.Linear(6, 6)})
        self.language_model = nn.ModuleDict({"layers": nn.ModuleList([block])})
        self.visual = nn.ModuleDict({"blocks": copy.deepcopy(nn.ModuleList([block]))})

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.visual["blocks"], self.language_model["layers"]):
            x = part[0]["o_proj"](torch.tanh(part[0]["q_proj"](x)))
        return x


class Moved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.lm_head = Inner(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.model(x))


X = normal(3, 6, seed=1, dtype=torch.float32)


def written(
    model: nn.Module, config: Any, folder: Path, x: Tensor, change: Callable[[str], str]
) -> Tensor:
    """PEFT's outputs, and its folder with keys as an older release had them."""
    torch.manual_seed(0)
    made = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.3 * torch.randn_like(p) * p.requires_grad
        y = made(x)
    made.save_pretrained(folder)
    tensors = {change(key): t for key, t in load_file(folder).items()}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return y if isinstance(y, Tensor) else y.logits


OLDER = {
    "taken in": lambda key: key.replace("model.language_model.layers", "model.layers"),
    "turned around": lambda key: key.replace("model.language_model", "language_model.model"),
    "alone": lambda key: key.replace("model.language_model.layers", "layers"),
}


@pytest.mark.parametrize("name", OLDER)
def test_a_language_model_that_moved(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Moved().eval()
    config = peft.LoraConfig(
        r=2,
        target_modules=["layers.0.q_proj", "layers.0.o_proj"],
        rank_pattern={"q_proj": 3},
        alpha_pattern={r"layers.0.o_proj": 5},
        modules_to_save=["lm_head"],
    )
    right = written(model, config, tmp_path, X, OLDER[name])
    params = ll.from_peft(tmp_path, model)
    assert "model.language_model.layers.0.q_proj" in params[1]
    close(ll.apply(model, params, X), right, 1e-5)


WRAPPED = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled layer by layer": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "data parallel": lambda key: f"module.{key}",
    "differentially private": lambda key: f"_module.{key}",
    "sharded": lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "checkpointed": lambda key: key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "PEFT twice": lambda key: f"base_model.model.{key}",
    "bare": lambda key: key.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_wrapped_the_model_as_it_was_saved(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Moved().eval()
    config = peft.LoraConfig(
        r=2,
        target_modules=r".*language_model\.layers.*_proj",
        rank_pattern={"q_proj": 3},
        modules_to_save=["lm_head"],
    )
    right = written(model, config, tmp_path, X, WRAPPED[name])
    close(ll.apply(model, ll.from_peft(tmp_path, model), X), right, 1e-5)


def test_paths_that_could_be_several_are_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.text_model = nn.ModuleDict({"q": nn.Linear(6, 6)})
    model.vision_model = copy.deepcopy(nn.ModuleDict({"q": nn.Linear(6, 6)}))
    tensors = {
        "base_model.model.language_model.q.lora_A.weight": torch.randn(2, 6),
        "base_model.model.language_model.q.lora_B.weight": torch.randn(6, 2),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    with pytest.raises(
        ll.CheckpointError,
        match=r"no 'language_model.q', which could be 'text_model.q' or 'vision_model.q'; say which"
        r" with rename=\{'language_model.q': 'text_model.q'\}",
    ):
        ll.from_peft(tensors, model, config=config)
    for rename in (
        {"language_model": "text_model"},
        lambda path: path.replace("language", "text"),
    ):
        with pytest.raises(ll.CheckpointError, match=r"target_modules name 'vision_model\.q'"):
            ll.from_peft(tensors, model, config=config, rename=rename)
        alone = {**config, "target_modules": ["language_model.q"]}
        assert [*ll.from_peft(tensors, model, config=alone, rename=rename)] == ["text_model.q"]
    wrong: list[tuple[Any, type[Exception], str]] = [
        ({"language_model": "nowhere"}, ll.CheckpointError, "becomes 'nowhere.q', which Module"),
        (
            {"language_model": "text_model", "other": "x"},
            ll.CheckpointError,
            "'other' is in none of the file's paths",
        ),
        ("text_model", ll.ConfigError, "rename: expected a mapping of names or a function"),
        (lambda path: None, ll.ConfigError, "rename: expected a path for 'language_model.q'"),
    ]
    for rename, error, message in wrong:
        with pytest.raises((error, ll.CheckpointError), match=message):
            ll.from_peft(tensors, model, config=alone, rename=rename)
    with pytest.raises(ll.CheckpointError, match=r"rename: .*give it too"):
        ll.from_peft(tensors, config=alone, rename={"language_model": "text_model"})


@pytest.mark.parametrize(
    "rename", [{"old.part": "model.visual"}, lambda name: name.replace("old.part", "model.visual")]
)
def test_names_of_a_diffusion_file(rename: Any) -> None:
    model = Moved()
    key = "unet.old.part.blocks.0.q_proj.lora_{}.weight"
    tensors = {key.format("A"): torch.randn(2, 6), key.format("B"): torch.randn(6, 2)}
    with pytest.raises(ll.CheckpointError, match=r"no module for 'old\.part\.blocks"):
        ll.from_diffusion(tensors, model)
    params = ll.from_diffusion(tensors, model, rename=rename)
    assert [*params] == ["model.visual.blocks.0.q_proj"]
    with pytest.raises(
        ll.CheckpointError, match=r"becomes 'nowhere\.blocks\.0\.q_proj', which Moved"
    ):
        ll.from_diffusion(tensors, model, rename={"old.part": "nowhere"})
    with pytest.raises(ll.CheckpointError, match="'other' is in none of the file's paths"):
        ll.from_diffusion(tensors, model, rename={"old.part": "model.visual", "other": "x"})


def test_the_command_line_takes_what_has_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = Moved().eval()
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    written(model, config, tmp_path / "file", X, lambda key: key.replace("lm_head", "out.head"))
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    where = [str(tmp_path / "base"), str(tmp_path / "file"), str(tmp_path / "out")]
    assert main(["merge", *where, "--rename", "out.head=lm_head"]) == 0
    dense = load_file(tmp_path / "out", "model.safetensors")
    params = ll.from_peft(tmp_path / "file", model, rename={"out.head": "lm_head"})
    close(dense["lm_head.weight"], ll.merge(model, params)["lm_head.weight"], 1e-6)
    capsys.readouterr()
    assert main(["merge", *where, "--force", "--rename", "out=nowhere"]) == 1
    assert "becomes 'nowhere.head'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["merge", *where, "--rename", "out"])


# ------------------------------------------------------------------------------------ real models
def vlm(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "Qwen2VL":
        text = TEXT | {"rope_parameters": {"mrope_section": [1, 1, 2], "type": "mrope"}}
        text["rope_parameters"] |= {"rope_type": "default", "rope_theta": 1e4}
        config = transformers.Qwen2VLConfig(
            text_config=text,
            vision_config={
                "depth": 1,
                "embed_dim": 16,
                "hidden_size": 16,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            image_token_id=15,
            video_token_id=16,
            vision_start_token_id=17,
            vision_end_token_id=18,
        )
        return transformers.Qwen2VLForConditionalGeneration(config).eval()
    config = transformers.Gemma3Config(
        text_config=TEXT | {"head_dim": 8},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
        image_token_index=19,
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", ["Qwen2VL", "Gemma3"])
def test_adapters_of_vision_language_models_before_their_layers_moved(
    name: str, tmp_path: Path
) -> None:
    model = vlm(name)
    old = "taken in" if name == "Qwen2VL" else "turned around"
    # Gemma 3's picture has layers of the same names, at other paths
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    right = written(model, config, tmp_path, IDS, OLDER[old])
    close(ll.apply(model, ll.from_peft(tmp_path, model), IDS).logits, right, 1e-5)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_a_pair_for_each_expert(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if name == "Mixtral":
        config = transformers.MixtralConfig(**TEXT, num_local_experts=3)
        old, roles = "block_sparse_moe", ("w1", "w3", "w2")
    else:
        config = transformers.Qwen3MoeConfig(
            **TEXT, head_dim=8, moe_intermediate_size=8, num_experts=3, num_experts_per_tok=2
        )
        old, roles = "mlp", ("gate_proj", "up_proj", "down_proj")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    dense, tensors = copy.deepcopy(model), {}
    for layer in range(2):
        stacks = dense.model.layers[layer].mlp.experts
        for expert in range(3):
            for i, role in enumerate(roles):
                r = 3 if i == 1 else 2
                d_in, d_out = (8, 16) if i == 2 else (16, 8)
                A, B = torch.randn(r, d_in), torch.randn(d_out, r) / 5
                if (layer, expert) == (1, 2):
                    continue  # an expert without any
                key = f"base_model.model.model.layers.{layer}.{old}.experts.{expert}.{role}"
                tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
                with torch.no_grad():
                    change = 4 / r * B @ A
                    if i == 2:
                        stacks.down_proj[expert] += change
                    else:
                        stacks.gate_up_proj[expert, 8 * i : 8 * (i + 1)] += change
    said = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": [*roles],
        "rank_pattern": {roles[1]: 3},
    }
    params = ll.from_peft(tensors, model, config=said)
    assert len(params) == 4
    close(ll.apply(model, params, IDS).logits, dense(IDS).logits, 1e-5)
    ll.to_peft(params, model, tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    close(again(IDS).logits, dense(IDS).logits, 1e-5)
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    with pytest.raises(ll.CheckpointError, match=r"expert 0: expected factors \(r, 16\)"):
        ll.from_peft(tensors | {key: torch.randn(2, 7)}, model, config=said)
    bias = {key.replace("lora_A.weight", "lora_B.bias"): torch.zeros(8)}
    with pytest.raises(ll.CheckpointError, match=r"a plain LoRA pair is read, found .*bias"):
        ll.from_peft(tensors | bias, model, config=said)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


def neox() -> Any:
    config = {name: TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    made = transformers.GPTNeoXConfig(**config, num_hidden_layers=2, num_attention_heads=2)
    return transformers.GPTNeoXForCausalLM(made).eval()


MOVED: dict[str, dict[str, Any]] = {
    "ViT": {
        "make": vit,
        "now": {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]},
        "then": {"target_modules": ["query", "intermediate.dense"]},
        "names": {
            ".layers.": ".encoder.layer.",
            "attention.q_proj": "attention.attention.query",
            "mlp.fc1": "intermediate.dense",
        },
        "x": normal(2, 3, 8, 8, seed=1, dtype=torch.float32),
    },
    "a head": {
        "make": neox,
        "now": {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]},
        "then": {"modules_to_save": ["embed_out"]},
        "names": {"lm_head": "embed_out"},
        "x": IDS,
    },
}


@pytest.mark.parametrize("name", MOVED)
def test_names_that_transformers_4_gave(name: str, tmp_path: Path) -> None:
    """Modules that transformers renames in the model's own checkpoints, of the factors and of what
    is trained whole.
    """
    case = MOVED[name]
    pytest.importorskip("transformers.conversion_mapping")

    def older(key: str) -> str:
        for new, old in case["names"].items():
            key = key.replace(new, old)
        return key

    torch.manual_seed(0)
    model = case["make"]()
    config = peft.LoraConfig(r=2, **case["now"])
    right = written(model, config, tmp_path, case["x"], older)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | case["then"]))
    close(ll.apply(model, ll.from_peft(tmp_path, model), case["x"]).logits, right, 1e-5)
