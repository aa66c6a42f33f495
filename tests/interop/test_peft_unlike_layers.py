"""Layers of which PEFT computes something else than a change of the weight: refused both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, moved
from peft_models import peft, saved
from torch import Tensor, nn

import lora_lite_func as ll

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::peft", "ignore:::torch")

PICTURES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(10).view(2, 5)


class Centred(nn.Conv2d):
    """A convolution by its weight less each kernel's mean."""

    def forward(self, x: Tensor) -> Tensor:
        W = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, W, self.bias)


class Shared(nn.Module):
    """One layer under two names, between others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second, self.head = self.first, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


def chain(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))


CONV: dict[str, Any] = {"target_kinds": ("conv",)}
UNLIKE: dict[str, tuple[Any, Tensor, dict[str, Any], str]] = {
    "reflected": (
        lambda: chain(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        PICTURES,
        CONV,
        r"padded with zeros, .* by 'reflect'; pad before it",
    ),
    "centred": (
        lambda: chain(Centred(4, 4, 3)),
        PICTURES,
        CONV,
        "a Centred does more than a convolution",
    ),
    "spread": (
        lambda: chain(nn.Conv2d(4, 4, 3, padding="same", dilation=2)),
        PICTURES,
        CONV,
        "LORA doesn't spread its update",
    ),
    "shortened": (
        lambda: chain(nn.Embedding(10, 4, max_norm=1.0)),
        IDS,
        {"target_kinds": ("embedding",)},
        "shortens the rows",
    ),
}


def called(layer: nn.Module, x: Tensor) -> nn.Module:
    layer(x)
    return layer.eval()


@pytest.mark.parametrize("name", UNLIKE)
def test_what_peft_computes_in_another_way(name: str, tmp_path: Path) -> None:
    make, x, config, match = UNLIKE[name]
    model = called(make(), x)
    saved(peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model, tmp_path, x=x)
    with pytest.raises(ll.CheckpointError, match=f"'0': .*{match}.*merge it in PEFT"):
        ll.from_peft(tmp_path, model)
    params = ll.init(model, ll.LoRAConfig(r=2, **config))
    with pytest.raises(ll.UnsupportedError, match=rf"to_peft: '0': .*{match}.*\(ll\.merge\)"):
        ll.to_peft(params, model, tmp_path / "ours")


def test_a_layer_under_two_names(tmp_path: Path) -> None:
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    model = Shared().eval()
    config = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    saved(config, model, tmp_path, x=x)
    with pytest.raises(ll.CheckpointError, match=r"'first': its module is 'second' too"):
        ll.from_peft(tmp_path, model)
    params = ll.init(model, ll.LoRAConfig(r=2))
    with pytest.raises(ll.UnsupportedError, match=r"its module is 'second' too, .*copy\.deepcopy"):
        ll.to_peft(params, model, tmp_path / "ours")
    apart = copy.deepcopy(model)
    apart.second = copy.deepcopy(apart.first)
    params = moved(ll.init(apart, ll.LoRAConfig(r=2)))
    ll.to_peft(params, apart, tmp_path / "apart")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(apart), tmp_path / "apart").eval()
    close(again(x), ll.apply(apart, params, x), 1e-5)


@pytest.mark.parametrize("padding", [0, 1])
def test_layers_that_pefts_update_is_a_change_of(padding: int, tmp_path: Path) -> None:
    """Padding that nothing is padded with, kernels of one place, and PEFT's gates of outputs."""
    reflect = {"padding": padding, "padding_mode": "reflect"}
    model = called(chain(nn.Conv2d(4, 4, 1 if padding else 3, **reflect)), PICTURES)  # type: ignore[arg-type]
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    if not padding:
        right = saved(config, model, tmp_path, x=PICTURES)
        close(ll.apply(model, ll.from_peft(tmp_path, model), PICTURES), right, 1e-5)
    gates = peft.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False)
    right = saved(gates, model, tmp_path / "gates", x=PICTURES)
    close(ll.apply(model, ll.from_peft(tmp_path / "gates", model), PICTURES), right, 1e-5)


@pytest.mark.parametrize("config", [ll.LoHaConfig(r=2), ll.OFTConfig(block_size=2)])
def test_methods_that_take_no_transposed_layer(config: ll.AdapterConfig, tmp_path: Path) -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(pytorch_utils.Conv1D(6, 4), nn.Linear(6, 4))
    with pytest.raises(ll.UnsupportedError, match=r"to_peft: '0': PEFT's .* stored transposed"):
        ll.to_peft(ll.init(model, config), model, tmp_path)


def test_a_bag_of_rows_is_none_of_pefts_layers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 3))
    params = ll.init(model, ll.LoRAConfig(r=2, target_kinds=("embedding",)))
    with pytest.raises(ll.UnsupportedError, match=r"to_peft: '0': .*use an nn\.Embedding"):
        ll.to_peft(params, model, tmp_path)


def test_attention_with_keys_of_another_width(tmp_path: Path) -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, kdim=4, vdim=6)})
    params = ll.init(model, ll.LoRAConfig(r=2, target_names=("out_proj",)))
    with pytest.raises(ll.UnsupportedError, match=r"to_peft: 'mha': .*as wide as its queries"):
        ll.to_peft(params, model, tmp_path)


def test_an_adapter_that_attention_never_calls(tmp_path: Path) -> None:
    """PEFT's wrapper of out_proj alone: a start that is the base is read, another is refused."""
    model: Any = Attending().eval()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    for name, start in (("base", True), ("noise", False)):
        config = peft.LoraConfig(r=2, target_modules=["out_proj", "head"], init_lora_weights=start)
        made = peft.get_peft_model(copy.deepcopy(model), config).eval()
        made.save_pretrained(tmp_path / name)
        if start:
            params = ll.from_peft(tmp_path / name, model)
            close(ll.apply(model, params, x), made(x), 1e-5)
        else:
            with pytest.raises(ll.CheckpointError, match=r"'mha\.out_proj': attention reads"):
                ll.from_peft(tmp_path / name, model)


class Attending(nn.Module):
    """Attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.mha, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mha(x, x, x, need_weights=False)[0])
