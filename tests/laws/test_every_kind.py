"""Every method on every kind of place that it declares: one function in many forms, and what each kind's own semantics ask for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case
from helpers import close, leaves, moved, same_state, snapshot
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import lora_lite_func as ll


class Transposed(nn.Module):
    """A linear layer stored (d_in, d_out), as transformers' Conv1D."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.empty(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """Stacked weights, each expert taking its part of the rows."""

    def __init__(self, count: int, d_in: int, d_out: int, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.proj = nn.Parameter(
            torch.empty(count, *((d_in, d_out) if is_transposed else (d_out, d_in)))
        )

    def forward(self, x: Tensor) -> Tensor:
        count = self.proj.shape[0]
        parts = [
            F.linear(x[e::count], self.proj[e].mT if self.is_transposed else self.proj[e])
            for e in range(count)
        ]
        return torch.cat(parts)


class Mixing(nn.Module):
    """A bare matrix, used twice, and a bare vector."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.empty(n, n))
        self.gain = nn.Parameter(torch.empty(n))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.mix) @ self.mix.mT * self.gain


class Plus(nn.Module):
    """A norm that uses 1 + its weight."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) * (1.0 + self.weight)


class Scaled(nn.Embedding):
    """A look-up that changes ids and rows around nn.Embedding's own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 1) * 3.0


class Own(nn.Embedding):
    """A look-up of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return self.weight[input] * 2.0


def seeded(model: nn.Module) -> Any:
    """Random weights, float64, eval mode."""
    gen = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape, generator=gen, dtype=torch.float64)
                * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)
            )
    return model


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


IDS = torch.tensor([[1, 3, 0], [5, 5, 14]])

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


def method(case: Case) -> str:
    cfg = case.config(r=4)
    return next(v.name for v in ll.variants().values() if v.config is type(cfg))


ALL = [
    (case, name)
    for case in CASES
    for name, (kind, *_) in PLACES.items()
    if kind in ll.variants()[method(case)].sites
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
    for leaf, trained in params.layout.trainable[path].items():
        if trained:
            close(direct[path][leaf], through[path][leaf], 1e-9)
            close(held[leaf], direct[path][leaf], 1e-9)
            assert direct[path][leaf].any()
    assert all(p.grad is None for p in model.parameters())
