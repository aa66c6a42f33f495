"""PEFT's layers beside ours: the same tensors, outputs and gradients of every tensor and of x.

Our leaves are made of PEFT's parameters by a differentiable map, so both sides' gradients are those
of PEFT's parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import close
from torch import Tensor, nn

import lora_lite_func as ll
from lora_lite_func.core.adapter import replace

peft = pytest.importorskip("peft")

D_IN, D_OUT = 16, 24
Map = Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]


class Tiny(nn.Module):
    """One frozen layer, float64."""

    def __init__(self, d_in: int = D_IN, d_out: int = D_OUT) -> None:
        super().__init__()
        self.l = nn.Linear(d_in, d_out, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x)


def theirs(model: nn.Module, config: Any) -> tuple[nn.Module, Any]:
    """PEFT's model and its layer, with noise in all that it trains, float64."""
    config.target_modules = ["l"]
    made = (
        peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
        .double()
        .eval()
    )
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "ranknum" in name:  # AdaLoRA's rank is a parameter too, but not one to train
                p.requires_grad_(False)
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=gen, dtype=torch.float64)
    return made, made.base_model.model.l


def ours(model: nn.Module, config: ll.AdapterConfig, leaves: dict[str, Tensor]) -> ll.Adapter:
    """An adapter with these leaves, the others as they start."""
    params = ll.init(model, config)
    assert set(leaves) <= set(params["l"])
    for name, t in leaves.items():
        assert t.shape == params["l"][name].shape, name
    return replace(params, {"l": {**params["l"], **leaves}})


def compare(
    model: nn.Module,
    their_config: Any,
    our_config: ll.AdapterConfig,
    take: Map,
    tol: float = 1e-10,
    x_gradient: bool = True,
    single: bool = False,
) -> None:
    """The same outputs and gradients, within tol. With `single`, PEFT makes its adapter of float32
    weights.
    """
    made, site = theirs(copy.deepcopy(model).float() if single else model, their_config)
    trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
    assert trained
    gen = torch.Generator().manual_seed(4)
    x = torch.randn(2, 5, model.l.in_features, generator=gen, dtype=torch.float64).requires_grad_()
    g = torch.randn(2, 5, model.l.out_features, generator=gen, dtype=torch.float64)
    expected = made(x)
    expected_grads = torch.autograd.grad((expected * g).sum(), [*trained.values(), x])
    short = {
        n.split(".l.", 1)[1].replace(".default", "").removesuffix(".weight"): p
        for n, p in trained.items()
    }
    found = ll.apply(model, ours(model, our_config, take(site, short)), x)
    found_grads = torch.autograd.grad((found * g).sum(), [*trained.values(), x])
    assert (found - model(x)).abs().max() > 1e-3
    close(found, expected, tol)
    last = None if x_gradient else -1
    for name, a, b in list(zip([*short, "x"], found_grads, expected_grads, strict=True))[:last]:
        assert b.abs().max() > 0, name
        close(a, b, tol)


def renamed(**names: str) -> Map:
    """The map that only renames: PEFT's name = ours."""
    return lambda site, p: {our: p[their] for their, our in names.items()}
