"""Folders that PEFT's users have beside PEFT's plain one: in shards, emptied, laid out by an older
release, one level too high. They are read as they are meant, or refused with the way out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import close
from peft_models import IDS, Mixed, X, base, load_file, loaded, peft, saved
from torch import Tensor, nn

import lora_lite_func as ll

pytestmark = pytest.mark.filterwarnings("ignore")

BOTH = ["up", "down"]


def rewritten(folder: Path, tensors: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def test_the_folder_above_an_adapter_names_those_below(tmp_path: Path) -> None:
    model = base()
    for name in ("checkpoint-200", "checkpoint-400"):
        saved(peft.LoraConfig(r=3, target_modules=BOTH), model, tmp_path / name)
    with pytest.raises(ll.CheckpointError, match="adapters are in checkpoint-200, checkpoint-400"):
        ll.from_peft(tmp_path, model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapters.safetensors", r"an adapter of MLX's, which mlx_lm.fuse merges"),
        ("model.safetensors", "holds a whole model"),
        ("model-00001-of-00002.safetensors", "holds a whole model"),
        ("pytorch_model.bin", "holds a whole model"),
        ("notes.txt", "found neither$"),
    ],
)
def test_a_folder_of_something_else_says_so(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ll.CheckpointError, match=message):
        ll.from_peft(tmp_path, base())


@pytest.mark.parametrize("what", ["everything", "factors", "a head"])
def test_tensors_that_a_sharded_save_emptied(what: str, tmp_path: Path) -> None:
    model = base()
    config = peft.LoraConfig(r=3, target_modules=["up"], modules_to_save=["layers.1.down"])
    saved(config, model, tmp_path)
    part = {"factors": "lora_A", "a head": "down"}.get(what, "")
    tensors = {k: torch.zeros(0) if part in k else t for k, t in load_file(tmp_path).items()}
    rewritten(tmp_path, {} if what == "everything" else tensors)
    with pytest.raises(
        ll.CheckpointError, match=r"is empty, as where DeepSpeed's ZeRO-3 .* gather"
    ):
        ll.from_peft(tmp_path, model)


def test_an_adapter_in_shards(tmp_path: Path) -> None:
    model = base()
    right = saved(peft.LoraConfig(r=3, target_modules=BOTH), model, tmp_path)
    tensors = sorted(load_file(tmp_path).items())
    (tmp_path / "adapter_model.safetensors").unlink()
    names = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        safetensors.torch.save_file(dict(tensors[i::2]), tmp_path / name)
    close(ll.apply(model, ll.from_peft(tmp_path, model), X), right, 1e-5)
    with pytest.raises(ll.CheckpointError, match=r"expected 2 files .*, found 1; take the whole"):
        ll.from_peft(tmp_path / names[0], model)
    safetensors.torch.save_file(dict(tensors), tmp_path / names[0])
    with pytest.raises(ll.CheckpointError, match="is in another shard too"):
        ll.from_peft(tmp_path, model)
    (tmp_path / names[1]).unlink()
    with pytest.raises(ll.CheckpointError, match=r"expected 2 files .*, found 1"):
        ll.from_peft(tmp_path, model)


LAYERS: dict[str, dict[str, Any]] = {
    "a list at the root": {"target_modules": ["up"], "layers_to_transform": [1]},
    "with its name": {
        "target_modules": ["up"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "a whole path, in no such layer": {
        "target_modules": ["layers.1.up"],
        "layers_to_transform": [0],
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_releases_of_peft_count_in_other_ways(name: str, tmp_path: Path) -> None:
    model = base()
    right = saved(peft.LoraConfig(r=3, target_modules=r".*1\.up"), model, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | LAYERS[name]))
    close(ll.apply(model, ll.from_peft(tmp_path, model), X), right, 1e-5)
    if name != "a whole path, in no such layer":
        elsewhere = {"layers_to_transform": [0]}
        config.write_text(json.dumps(json.loads(config.read_text()) | elsewhere))
        with pytest.raises(ll.CheckpointError, match=r"'layers\.[01]\.up', (which|for which)"):
            ll.from_peft(tmp_path, model)


@pytest.mark.parametrize("square", [False, True])
def test_experts_as_peft_0_18_laid_them_out(square: bool) -> None:
    """It took a stored (E, d_out, d_in) for (E, d_in, d_out)."""
    torch.manual_seed(0)
    model: Any = Mixed()
    if square:
        model.experts.gate_up = nn.Parameter(torch.randn(3, 8, 8) / 3)
        model.experts.down = nn.Parameter(torch.randn(3, 8, 8) / 3)
    experts, rows, columns = model.experts.gate_up.shape
    A, B = torch.randn(experts * 2, rows), torch.randn(columns, 2 * experts)
    tensors = {f"base_model.model.experts.lora_{n}.weight": t for n, t in (("A", A), ("B", B))}
    says = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": [],
        "target_parameters": ["experts.gate_up"],
        "peft_version": "0.18.1",
    }
    change = 2 * torch.einsum("ire,ero->eoi", B.view(columns, 2, experts), A.view(experts, 2, rows))
    params = ll.from_peft(tensors, model, config=says)
    close(ll.merge(model, params)["experts.gate_up"], model.experts.gate_up + change, 1e-5)
    if square:
        newer = ll.from_peft(tensors, model, config=says | {"peft_version": "0.19.1"})
        close(ll.merge(model, newer)["experts.gate_up"], model.experts.gate_up + change.mT, 1e-5)
    close(ll.apply(model, params, IDS), ll.merged(model, params)(IDS), 1e-5)


def test_a_head_of_another_vocabulary(tmp_path: Path) -> None:
    """Modules trained whole beside a vocabulary that had grown."""
    model, grown = Mixed(), Mixed()
    grown.head = nn.Linear(8, 14, bias=False)
    config = peft.LoraConfig(r=2, target_modules=["back"], modules_to_save=["head"])
    peft.get_peft_model(grown, config).save_pretrained(tmp_path)
    with pytest.raises(
        ll.CheckpointError, match=r"do so first \(model.resize_token_embeddings\(14"
    ):
        ll.from_peft(tmp_path, model)


def test_a_state_dict_with_another_adapters_name_in_it() -> None:
    """As model.state_dict() gives it, and not get_peft_model_state_dict."""
    model = base()
    config = peft.LoraConfig(r=3, target_modules=BOTH, init_lora_weights=False)
    wrapped = peft.get_peft_model(base(), config, adapter_name="story_1")
    right = wrapped(X)
    raw = {k: t for k, t in wrapped.state_dict().items() if "lora_" in k}
    close(ll.apply(model, ll.from_peft(raw, model, config=config.to_dict()), X), right, 1e-5)
    wrapped.add_adapter("tone", config)
    raw = {k: t for k, t in wrapped.state_dict().items() if "lora_" in k}
    with pytest.raises(ll.CheckpointError, match=r"adapters 'story_1', 'tone'; take one's \(peft"):
        ll.from_peft(raw, model, config=config.to_dict())


class Grouped(nn.Module):
    """Convolutions in groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(4, 8, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


@pytest.mark.parametrize("feedforward", [True, False])
def test_ia3_of_a_convolution_in_groups(feedforward: bool, tmp_path: Path) -> None:
    model, x = Grouped(), torch.randn(2, 4, 5, 5)
    names = {"target_modules": ["conv"], "feedforward_modules": ["conv"] if feedforward else []}
    right = saved(peft.IA3Config(**names), model, tmp_path, x=x)
    params = ll.from_peft(tmp_path, model)
    close(ll.apply(model, params, x), right, 1e-5)
    close(ll.merged(model, params)(x), right, 1e-5)


def test_lora_that_sees_all_groups_of_a_convolution_is_refused(tmp_path: Path) -> None:
    model = Grouped()
    config = peft.LoraConfig(r=4, target_modules=["conv"])
    saved(config, model, tmp_path, x=torch.randn(2, 4, 5, 5))
    with pytest.raises(ll.CheckpointError, match=r"sees the inputs of all 2 groups .* exclude"):
        ll.from_peft(tmp_path, model)


class Two(nn.Module):
    """A language model beside a tower with modules of the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"language_model": base(), "tower": base()})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model["language_model"](x) + self.model["tower"](x)
        return out


def test_an_adapter_of_a_part_of_the_model(tmp_path: Path) -> None:
    """As one of a language model alone, in a model with vision."""
    small, large = base(), Two()
    right = saved(peft.LoraConfig(r=3, target_modules=BOTH), small, tmp_path)
    params = ll.from_peft(tmp_path, large)
    close(ll.apply(large, params, X), right + large.model["tower"](X), 1e-5)
    tensors = {k: t for k, t in load_file(tmp_path).items() if "layers.1" not in k}
    rewritten(tmp_path, tensors)
    with pytest.raises(ll.CheckpointError, match=r"'model.language_model.layers.1.up'.* no tensor"):
        ll.from_peft(tmp_path, large)


def test_nothing_merges_into_a_model_without_values(tmp_path: Path) -> None:
    model = base()
    saved(peft.LoraConfig(r=3, target_modules=BOTH), model, tmp_path)
    empty = base().to("meta")
    params = ll.from_peft(tmp_path, empty)
    with pytest.raises(
        ll.UnsupportedError, match=r"on the meta device, .* load the model's weights"
    ):
        ll.merged(empty, params)


def test_another_adapter_that_an_older_save_has_let_in(tmp_path: Path) -> None:
    """PEFT 0.17 saves what has the adapter's name as a part of its own: "v1" in "v1_long"."""
    model = base()
    right = saved(peft.LoraConfig(r=3, target_modules=BOTH), model, tmp_path)
    others = {
        key.replace(".weight", f".{name}.weight"): torch.randn_like(t)
        for key, t in load_file(tmp_path).items()
        for name in ("v1_long", "default")
    }
    rewritten(tmp_path, load_file(tmp_path) | others)
    close(ll.apply(model, ll.from_peft(tmp_path, model), X), right, 1e-5)


def test_an_adapter_that_was_called_lora(tmp_path: Path) -> None:
    """PEFT 0.17 cut its name out of the whole key."""
    model = base()
    right = saved(peft.LoraConfig(r=3, target_modules=BOTH, use_dora=True), model, tmp_path)
    rewritten(tmp_path, {k.replace(".lora", ""): t for k, t in load_file(tmp_path).items()})
    close(ll.apply(model, ll.from_peft(tmp_path, model), X), right, 1e-5)


def test_oft_blocks_of_sizes_that_peft_takes_for_one(tmp_path: Path) -> None:
    """It takes the nearest size that divides a layer: 8 of 16 and 6 of 24 for 7."""
    model = base()
    right = saved(peft.OFTConfig(oft_block_size=7, target_modules=BOTH), model, tmp_path)
    ll.to_peft(ll.from_peft(tmp_path, model), model, tmp_path / "again")
    close(ll.apply(model, ll.from_peft(tmp_path / "again", model), X), right, 1e-5)
    close(loaded(model, tmp_path / "again"), right, 1e-5)
