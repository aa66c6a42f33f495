"""Every method on every kind of place that it declares: one function in many forms, and what each
kind's own semantics ask for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case
from helpers import close, leaves, moved, same_state, seeded, snapshot
from places import IDS, Experts, Mixing, Own, Scaled, Transposed, features, method
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import lora_lite_func as ll

PLACES: dict[str, tuple[str, Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "transposed": ("linear", lambda: Transposed(16, 24), features(4, 24), {}),
    "conv": (
        "conv",
        lambda: nn.Conv2d(8, 16, 2, stride=2, padding=1, padding_mode="circular", groups=2),
        features(2, 8, 5, 6),
        {},
    ),
    "deconv": (
        "conv",
        lambda: nn.ConvTranspose2d(8, 16, 2, 2, 1, 1, groups=2),
        features(2, 8, 5, 6),
        {},
    ),
    "embedding": ("embedding", lambda: nn.Embedding(16, 16, padding_idx=3), IDS, {}),
    "bounded": ("embedding", lambda: Scaled(16, 16, max_norm=1.0), IDS, {}),
    "own": ("embedding", lambda: Own(16, 16), IDS, {}),
    "norm": ("norm", lambda: nn.LayerNorm(16), features(3, 16), {}),
    "matrix": ("parameter", lambda: Mixing(16), features(3, 16), {"target_parameters": "mix"}),
    "experts": (
        "parameter",
        lambda: Experts(3, 16, 8, False),
        features(6, 16),
        {"target_parameters": "proj"},
    ),
    "turned": (
        "parameter",
        lambda: Experts(2, 16, 8, True),
        features(4, 16),
        {"target_parameters": "proj"},
    ),
    "vector": ("vector", lambda: Mixing(16), features(3, 16), {"target_parameters": "gain"}),
}
"""By name: kind, model, input, how the site is chosen."""

BY_CALL = {"transposed", "embedding", "bounded"}

STACKS = {"experts", "turned"}
"""Places where the parameter is a stack of weights, one for each expert."""


ALL = [
    (case, name)
    for case in CASES
    for name, (kind, *_) in PLACES.items()
    if kind in ll.variants()[method(case)].sites and (case.stacks or name not in STACKS)
    if case.update is None
]
every = pytest.mark.parametrize(("case", "name"), ALL, ids=lambda v: str(v))


def start(case: Case, name: str) -> tuple[nn.Module, ll.Adapter, Tensor]:
    kind, build, x, chosen = PLACES[name]
    model = seeded(build())
    cfg = case.config(r=4, **(chosen or {"target_kinds": kind}))
    return model, ll.init(model, cfg, seed=3), x


def loss(model: nn.Module, params: Any, x: Tensor) -> Tensor:
    return ll.apply(model, params, x).square().sum()


def dense(model: nn.Module, params: ll.Adapter, x: Tensor) -> Tensor:
    """The model on merged weights; torch's own bound on a table's rows has no derivative, so that
    one is written out.
    """
    if getattr(model, "max_norm", None) is None:
        return functional_call(copy.deepcopy(model), ll.merge(model, params), (x,))
    rows = ll.merge(model, params)["weight"][x + 1]
    norm = rows.norm(dim=-1, keepdim=True)
    return torch.where(norm > model.max_norm, rows * model.max_norm / (norm + 1e-7), rows) * 3.0


# ------------------------------------------------------------------------------------- every method
@every
def test_identity_and_strength(case: Case, name: str) -> None:
    model, params, x = start(case, name)
    before = snapshot(model)
    y, base = ll.apply(model, params, x), copy.deepcopy(model)(x)
    if case.exact and name in BY_CALL:
        assert torch.equal(y, base)
    if case.identity is not None:
        close(y, base, max(case.identity, 64.0) * torch.finfo(torch.float64).eps)
    params = moved(params)
    assert (ll.apply(model, params, x) - base).abs().max() > 1e-6
    close(ll.apply(model, ll.scale(params, 0.0), x), base, 1e-10)
    close(ll.apply(model, ll.scale(params, 1.0), x), ll.apply(model, params, x), 1e-10)
    assert same_state(before, snapshot(model))


@every
def test_one_function_in_many_forms(case: Case, name: str, tmp_path: Any) -> None:
    model, params, x = start(case, name)
    params = moved(params)
    before = snapshot(model)
    y = ll.apply(model, params, x)
    close(ll.merged(model, params)(x), y, 1e-10)
    close(functional_call(copy.deepcopy(model), ll.merge(model, params), (x,)), y, 1e-10)
    bound = ll.bind(model, params)
    close(bound(x), y, 1e-12)
    close(copy.deepcopy(bound)(x), y, 1e-12)
    close(leaves(ll.unbind(bound)), leaves(params), 0.0)
    ll.save(params, tmp_path / "a.safetensors")
    again = ll.load(tmp_path / "a.safetensors", model)
    assert again.layout == params.layout
    assert torch.equal(ll.apply(model, again, x), y)
    several = [params, moved(params, 2)]
    loop = torch.stack([ll.apply(model, p, x) for p in several])
    close(vmap(lambda p: ll.apply(model, p, x))(ll.stack(several)), loop, 1e-12)
    assert same_state(before, snapshot(model))


@every
def test_gradient_is_that_of_merged_weights(case: Case, name: str) -> None:
    model, params, x = start(case, name)
    params = moved(params)
    direct = grad(lambda p: loss(model, p, x))(params)
    through = grad(lambda p: dense(model, p, x).square().sum())(params)
    bound = ll.bind(model, params)
    bound(x).square().sum().backward()
    held = {n.rpartition(".")[2]: p.grad for n, p in bound.named_parameters() if p.requires_grad}
    (path,) = params
    for leaf, spec in params.layout.specs[path].items():
        if spec.trainable and leaf not in case.in_training:
            close(direct[path][leaf], through[path][leaf], 1e-9)
            close(held[leaf], direct[path][leaf], 1e-9)
            assert direct[path][leaf].any()
    assert all(p.grad is None for p in model.parameters())
