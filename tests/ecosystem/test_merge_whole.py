"""merge on folders as transformers writes them, whose names and tensors aren't the model's own; and
what a merged model's config says of its head.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import moved
from torch import Tensor

import lora_lite_func as ll
from lora_lite_func.cli.main import main

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **SIZES,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **SIZES)
    return transformers.GPT2LMHeadModel(config).eval()


def experts() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        **SIZES,
    )
    return transformers.Qwen3MoeForCausalLM(config).eval()


def without_prefix(folder: Path) -> None:
    """The names that GPT-2 has on the hub."""
    file = folder / "model.safetensors"
    tensors = {
        k.removeprefix("transformer."): t for k, t in safetensors.torch.load_file(file).items()
    }
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


PLACES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "gpt2": (gpt2, {"target_names": ("c_attn",)}, None),
    "gpt2 of the hub": (gpt2, {"target_names": ("c_attn",)}, without_prefix),
    "a tied head": (lambda: llama(True), {"target_names": ("q_proj", "lm_head")}, None),
    "a tied table": (lambda: llama(True), {"target_kinds": ("embedding",)}, None),
    "experts": (experts, {"target_names": (), "target_parameters": ("experts.down_proj",)}, None),
}


@pytest.mark.parametrize("name", PLACES)
def test_merged_folders_are_the_model_with_its_adapter(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, where, change = PLACES[name]
    model = make()
    if "lm_head" in where.get("target_names", ()):
        where = where | {"exclude_names": ()}
    params = moved(ll.init(model, ll.LoRAConfig(r=2, **where)))
    expected: Tensor = ll.apply(model, params, IDS).logits
    assert (expected - model(IDS).logits).abs().max() > 1e-4
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base)
    if change is not None:
        change(base)
    (base / "tokenizer.json").write_text("{}")
    ll.save(params, tmp_path / "a")
    assert main(["check", str(base), str(tmp_path / "a")]) == 0
    assert main(["merge", str(base), str(tmp_path / "a"), str(out)]) == 0
    capsys.readouterr()
    again = type(model).from_pretrained(out).eval()
    torch.testing.assert_close(again(IDS).logits, expected, atol=1e-5, rtol=1e-4)
    assert (out / "tokenizer.json").read_text() == "{}"
    tied = again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied


def test_the_bases_config_is_left_alone(tmp_path: Path) -> None:
    model = llama(True)
    config = ll.LoRAConfig(r=2, target_names=("lm_head",), exclude_names=())
    dense = ll.merged(model, moved(ll.init(model, config)))
    assert model.config.tie_word_embeddings is True
    assert dense.config.tie_word_embeddings is False
    elsewhere = ll.LoRAConfig(r=2, target_names=("q_proj",))
    assert ll.merged(model, moved(ll.init(model, elsewhere))).config.tie_word_embeddings is True


def test_a_packed_folder_that_cant_be_read_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama(False)
    params = moved(ll.init(model, ll.LoRAConfig(r=2, target_names=("q_proj",))))
    ll.save(params, tmp_path / "a")
    base = tmp_path / "base"
    model.save_pretrained(base)
    says = json.loads((base / "config.json").read_text())
    says["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(says))
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = torch.zeros(128, 1, dtype=torch.uint8)
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert main(["merge", str(base), str(tmp_path / "a"), str(tmp_path / "out")]) == 1
    assert "can't be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_that_a_folder_lacks_are_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config that asks for more than the folder holds: seven billion numbers here."""
    model = llama(False)
    where = ll.LoRAConfig(r=2, target_names=("q_proj",))
    ll.save(moved(ll.init(model, where)), tmp_path / "a")
    base = tmp_path / "base"
    base.mkdir()
    safetensors.torch.save_file({"0.weight": torch.zeros(4, 4)}, base / "model.safetensors")
    says = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (base / "config.json").write_text(json.dumps(says))
    assert main(["merge", str(base), str(tmp_path / "a"), str(tmp_path / "out")]) == 1
    assert "for transformers it lacks weights: it has 16 numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "named", [["os"], ["PreTrainedModel"], ["AutoModel"], [1], "x", ["logging"]]
)
def test_a_config_that_names_no_model(
    named: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    ll.save(moved(ll.init(model, ll.LoRAConfig(r=2))), tmp_path / "a")
    base = tmp_path / "base"
    base.mkdir()
    safetensors.torch.save_file({"0.weight": torch.zeros(4, 4)}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"architectures": named}))
    assert main(["check", str(base), str(tmp_path / "a")]) == 1
    assert "has no linear-like module '1'" in capsys.readouterr().err


def test_packed_weights_of_a_config_that_does_not_say_so_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers would take the numbers without their scales."""
    model = llama(False)
    where = ll.LoRAConfig(r=2, target_names=("q_proj",))
    ll.save(moved(ll.init(model, where)), tmp_path / "a")
    base = tmp_path / "base"
    model.save_pretrained(base)
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert main(["merge", str(base), str(tmp_path / "a"), str(tmp_path / "out")]) == 1
    assert "config.json says no quantization_config" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tables_that_peft_trained_beside_a_tied_head(
    names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT trains a copy of each module, and the other keeps the base's table."""
    peft = pytest.importorskip("peft")
    model, base, out = llama(True), tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p[1:] += torch.randn_like(p[1:]) / 5  # no gradient moves the row of padding
    theirs.save_pretrained(tmp_path / "a")
    right = theirs(IDS).logits
    params = ll.from_peft(tmp_path / "a", model)
    torch.testing.assert_close(ll.apply(model, params, IDS).logits, right, atol=1e-4, rtol=1e-4)
    assert main(["merge", str(base), str(tmp_path / "a"), str(out)]) == 0
    capsys.readouterr()
    again = type(model).from_pretrained(out).eval()
    torch.testing.assert_close(again(IDS).logits, right, atol=1e-4, rtol=1e-4)
