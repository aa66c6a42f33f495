"""DoRA over other adapters: its row norms are those of the weight with them in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import close, moved, normal
from torch import Tensor, nn

import lora_lite_func as ll


def layer(bias: bool = True, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 9, bias=bias, dtype=torch.float64))


def features(*shape: int) -> Tensor:
    return normal(*shape, 12, seed=3)


INNER = {
    "lora": ll.LoRAConfig(r=4),
    "ia3": ll.IA3Config(),
    "ia3_ff": ll.IA3FFConfig(),
    "hra": ll.HRAConfig(r=4),
    "bitfit": ll.BitFitConfig(),
    "dora": ll.DoRAConfig(r=4),
    "loha": ll.LoHaConfig(r=2),
}


def formula(W: Tensor, b: Tensor | None, p: Any, s: float, x: Tensor) -> Tensor:
    """The paper's, on a weight that others have changed."""
    V = W + s * p["lora_B"] @ p["lora_A"]
    return F.linear(x, p["lora_m"][:, None] * V / V.norm(dim=1, keepdim=True), b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("detach", [True, False])
def test_its_norms_are_those_of_the_weight_underneath(
    inner: ll.AdapterConfig, bias: bool, detach: bool
) -> None:
    model, x = layer(bias), features(2, 3)
    first = moved(ll.init(model, inner), size=0.7)
    dora = moved(ll.init(model, ll.DoRAConfig(r=3, detach_norm=detach)), seed=2, size=0.7)
    under: Any = ll.merged(model, first)[0]  # type: ignore[index]
    expected = formula(under.weight, under.bias, dora["0"], dora.sites["0"].scaling, x)
    close(ll.apply(model, (first, dora), x), expected, 1e-10)
    close(ll.bind(model, (first, dora))(x), expected, 1e-10)
    close(ll.prepared(model, (first, dora))(x), expected, 1e-10)
    if not isinstance(inner, ll.BitFitConfig) or bias:  # else there is no bias to merge into
        close(ll.merged(model, (first, dora))(x), expected, 1e-10)


def test_a_row_that_is_taken_back_whole_stays_bounded() -> None:
    model, x = layer().float(), features(4).float()
    dora = ll.init(model, ll.DoRAConfig(r=9, alpha=9.0))
    W = model[0].weight.detach()  # type: ignore[index]
    undone = {"lora_A": W, "lora_B": -torch.eye(9)}
    dora = ll.Adapter(dora.layout, {"0": {**dora["0"], **undone}})
    assert ll.apply(model, dora, x).abs().max() < 1e5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_starts_on_top_of_starts_are_the_identity(dtype: torch.dtype) -> None:
    model, x = layer().to(dtype), features(4).to(dtype)
    both = ll.init(model, ll.LoRAConfig(r=2)), ll.init(model, ll.DoRAConfig(r=2))
    assert torch.equal(ll.apply(model, both, x), model(x))
    assert torch.equal(ll.merged(model, both)(x), model(x))


@pytest.mark.parametrize("detach", [True, False])
def test_its_norms_are_those_of_the_weight_that_the_call_is_given(detach: bool) -> None:
    model, other, x = layer(), layer(seed=5), features(4)
    dora = moved(ll.init(model, ll.DoRAConfig(r=3, detach_norm=detach)), size=0.7)
    base = dict(other.named_parameters())
    W, b = base["0.weight"], base["0.bias"]
    expected = formula(W, b, dora["0"], dora.sites["0"].scaling, x)
    close(ll.functional_call(model, dora, x, base=base), expected, 1e-12)
    close(ll.functional_call(model, dora, x, base={"0.weight": W, "0.bias": b}), expected, 1e-12)
    if not detach:
        wanted = torch.autograd.grad(expected.square().sum(), W)
        y = ll.functional_call(model, dora, x, base=base)
        close(torch.autograd.grad(y.square().sum(), W), wanted, 1e-9)
    same = dict(model.named_parameters())
    start = ll.init(model, ll.DoRAConfig(r=3))
    assert torch.equal(ll.functional_call(model, start, x, base=same), model(x))


class OfAManifold(nn.Parameter):
    """A parameter that a library for optimisation on manifolds marks."""


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("how", ["in place", "by data", "tied", "of a subclass"])
def test_its_norms_are_those_of_the_weight_that_the_model_has_now(how: str, detach: bool) -> None:
    model: Any = layer()
    other: Any = layer(seed=5)
    x = features(4)
    dora = moved(ll.init(model, ll.DoRAConfig(r=3, detach_norm=detach)), size=0.7)
    if how == "in place":
        model[0].load_state_dict(other[0].state_dict())
    elif how == "by data":
        model[0].weight.data = other[0].weight.data
    elif how == "tied":
        model[0].weight = other[0].weight
    else:
        model[0].weight = OfAManifold(other[0].weight.detach())
    W, b = model[0].weight, model[0].bias
    expected = formula(W, b, dora["0"], dora.sites["0"].scaling, x)
    close(ll.apply(model, dora, x), expected, 1e-12)
    close(ll.bind(model, dora)(x), expected, 1e-12)
    close(ll.prepared(model, dora)(x), expected, 1e-12)
    close(ll.merged(model, dora)(x), expected, 1e-12)
    for strict in (False, True):
        program = torch.export.export(ll.bind(model, dora), (x,), strict=strict)
        close(program.module()(x), expected, 1e-12)
