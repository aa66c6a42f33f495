"""PEFT's X-LoRA: equal outputs, whole folders both ways, and its own that lack the classifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import close, moved
from safetensors.torch import load_file
from torch import Tensor

import lora_lite_func as ll

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
SETTINGS: dict[str, dict[str, Any]] = {
    "flat": {},
    "layerwise": {"layerwise_scalings": True, "softmax_temperature": 0.5},
    "deep": {"xlora_depth": 3, "xlora_size": 8, "top_k_lora": 2, "global_scaling_weight": 2.0},
    "dry": {"xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0, "enable_softmax": False},
    "topmost": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
}


def base() -> Any:
    model = FAMILIES["llama"].fresh()
    model.config.use_cache = False
    return model


def expert(folder: Path, seed: int) -> str:
    cfg = ll.LoRAConfig(r=2 + seed, alpha=6.0, target_names=("q_proj", "up_proj"))
    ll.to_peft(moved(ll.init(base(), cfg, seed=seed), seed, 0.3), base(), folder)
    return str(folder)


def theirs(tmp_path: Path, **fields: Any) -> Any:
    """PEFT's model of three experts, with a classifier as if trained."""
    adapters = {str(i): expert(tmp_path / f"e{i}", i) for i in range(3)}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **fields)
    torch.manual_seed(0)
    model = peft.get_peft_model(base(), config).eval()
    with torch.no_grad():
        for p in model.base_model.internal_xlora_classifier.parameters():
            p.copy_(torch.randn(p.shape) * 0.5)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(input_ids=IDS).logits
    return y


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_are_peft_s_and_whole_folders_go_both_ways(name: str, tmp_path: Path) -> None:
    model, folder = theirs(tmp_path, **SETTINGS[name]), tmp_path / "theirs"
    wanted = logits(model)
    model.save_pretrained(folder)
    classifier = model.base_model.internal_xlora_classifier.state_dict()
    experts = [tmp_path / f"e{i}" for i in range(3)]
    x = ll.xlora_from_peft(folder, base(), classifier=classifier, experts=experts)
    with torch.no_grad():
        close(x(base(), IDS).logits, wanted, 1e-4)
    ll.xlora_to_peft(x, base(), tmp_path / "ours")
    again = ll.xlora_from_peft(tmp_path / "ours", base())
    assert again.settings == x.settings
    close(again.head, x.head, 0.0)
    close(again.stack, x.stack, 0.0)
    adapters = {str(i): str(tmp_path / "ours" / str(i)) for i in range(3)}
    opened = peft.PeftModel.from_pretrained(
        base(), tmp_path / "ours", config=None, adapters=adapters
    ).eval()
    close(logits(opened), wanted, 1e-4)
    ll.xlora_to_peft(x, base(), tmp_path / "ours")  # over the old one
    close(ll.xlora_from_peft(tmp_path / "ours", base()).head, x.head, 0.0)


def test_a_folder_that_peft_left_the_classifier_out_of_is_refused(tmp_path: Path) -> None:
    """PEFT drops keys in which another adapter's name, "0", is a part."""
    for name, missing in (("flat", "layers.0.weight"), ("deep", "layers.0.weight")):
        model, folder = theirs(tmp_path / name, **SETTINGS[name]), tmp_path / name / "theirs"
        model.save_pretrained(folder)
        held = load_file(folder / "adapter_model.safetensors")
        assert not any(f".{missing}" in key for key in held)
        with pytest.raises(
            ll.CheckpointError, match=rf"lacks internal_xlora_classifier\.{missing}.*"
        ):
            ll.xlora_from_peft(folder, base())
        classifier = model.base_model.internal_xlora_classifier.state_dict()
        inside = load_file(folder / "0" / "adapter_model.safetensors")
        assert not any(".layers.1." in key for key in inside)  # "1" is another expert
        with pytest.raises(ll.CheckpointError, match=r"has another expert's name .* experts=\["):
            ll.xlora_from_peft(folder, base(), classifier=classifier)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    x = ll.xlora(base(), [ll.init(base(), ll.LoRAConfig(r=2, target_names="q_proj"))] * 2)
    ll.xlora_to_peft(x, base(), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    said = json.loads(file.read_text())

    def refused(message: str, **fields: Any) -> None:
        file.write_text(json.dumps(said | fields))
        with pytest.raises(ll.CheckpointError, match=message):
            ll.xlora_from_peft(tmp_path / "a", base())

    refused("expected peft_type 'XLORA', found 'LORA'", peft_type="LORA")
    refused("'scaling_pass_value' is 0.5, on which outputs depend", scaling_pass_value=0.5)
    refused("the classifier has 2 outputs, expected 4 for 2 experts at", layerwise_scalings=True)
    refused(r"2: no such folder", adapters={"0": "", "1": "", "2": ""})
    file.write_text(json.dumps(said))
    with pytest.raises(ll.CheckpointError, match="expected 2 experts, as `adapters` says, found 1"):
        ll.xlora_from_peft(tmp_path / "a", base(), experts=[tmp_path / "a" / "0"])
    with pytest.raises(ll.CheckpointError, match=r"'XLORA' isn't read here|xlora_from_peft"):
        ll.from_peft(tmp_path / "a", base())
    reft = ll.xlora(base(), [ll.init(base(), ll.LoRAConfig(r=2, target_names="q_proj"))] * 2)
    assert reft.settings.sites == (
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    )
