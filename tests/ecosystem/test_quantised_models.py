"""Models that transformers loads packed: in a Trainer, merged, saved as dense ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, leaves, moved

import lora_lite_func as ll
from lora_lite_func.cli.main import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = torch.randint(3, 64, (16, 8), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in ROWS]


def packing(name: str) -> Any:
    if name == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if name == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def loaded(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A small model, packed as transformers does it while it loads."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, quantization_config=packing(name), dtype=dtype)


@pytest.fixture(params=["nf4", "int8", "torchao"])
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def test_a_trainer_takes_it(kind: str, tmp_path: Path) -> None:
    model = loaded(kind, tmp_path / "base")
    settings = {"max_steps": 2, "report_to": [], "use_cpu": True, "save_steps": 2}
    args = transformers.TrainingArguments(
        str(tmp_path / "out"), learning_rate=1e-2, disable_tqdm=True, **settings
    )
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, args, train_dataset=DATA)
    bound = ll.bind(model, ll.init(model, ll.LoRAConfig(r=4)))
    before = [t.clone() for t in leaves(ll.unbind(bound))]
    transformers.Trainer(bound, args, train_dataset=DATA).train()
    after = leaves(ll.unbind(bound))
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert model.is_quantized
    assert not model._hf_peft_config_loaded
    checkpoint = tmp_path / "out/checkpoint-2"
    assert "adapter_config.json" in {entry.name for entry in checkpoint.iterdir()}
    again = ll.bind(model, ll.init(model, ll.LoRAConfig(r=4), seed=5))
    run = transformers.Trainer(again, args, train_dataset=DATA)
    run._load_from_checkpoint(str(checkpoint))
    assert all(torch.equal(a, b) for a, b in zip(leaves(ll.unbind(again)), after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_saved_and_loaded_as_a_dense_model(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = loaded(kind, tmp_path / "base", dtype)
    # on one layer alone: the others are dense, too
    params = moved(ll.init(model, ll.LoRAConfig(r=4, target_names=("q_proj",))))
    dense: Any = ll.merged(model, params, dequantize=True)
    assert {p.dtype for p in dense.parameters()} == {dtype}
    with torch.no_grad():
        y = dense(ROWS).logits
        off = (y - ll.apply(model, params, ROWS).logits).float().abs().max()
    assert off < (0.02 if dtype == torch.float32 else 0.05)  # int8 rounds its inputs
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert not getattr(again, "is_quantized", False)
    with torch.no_grad():
        assert torch.equal(again(ROWS).logits, y)
    assert model.is_quantized
    assert model.config.quantization_config is not None
    assert model.hf_quantizer is not None


def test_the_command_merges_a_packed_folder_into_a_dense_one(kind: str, tmp_path: Path) -> None:
    model = loaded(kind, tmp_path / "plain")
    model.save_pretrained(tmp_path / "base")
    params = moved(ll.init(model, ll.LoRAConfig(r=4)))
    ll.save(params, tmp_path / "a.safetensors")
    out = tmp_path / "out"
    assert main(["merge", *(str(tmp_path / n) for n in ("base", "a.safetensors", "out"))]) == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert not getattr(again, "is_quantized", False)
    with torch.no_grad():
        close(again(ROWS).logits, ll.merged(model, params, dequantize=True)(ROWS).logits, 1e-5)
