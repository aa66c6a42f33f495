"""Preconditioned gradients against the papers' formulas, written densely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from helpers import close, leaves, moved, net, normal
from torch import Tensor, nn

import lora_lite_func as ll

MODEL = net(depth=1)
X = normal(9, 16, seed=5)


def situation(config: ll.AdapterConfig | None = None) -> tuple[ll.Adapter, ll.Adapter]:
    """(params, their gradients)."""
    params = moved(ll.init(MODEL, config or ll.LoRAConfig(r=3, alpha=6)), size=0.5)
    return params, ll.grad(lambda p: ll.apply(MODEL, p, X).square().mean())(params)


def pair(tree: Any, path: str) -> tuple[Tensor, Tensor]:
    return tree[path]["lora_A"], tree[path]["lora_B"]


def full_gradient(params: ll.Adapter, path: str) -> Tensor:
    """The gradient of the merged weight at a site."""
    weights = ll.merge(MODEL, params)

    def loss(W: Tensor) -> Tensor:
        whole = {**weights, f"{path}.weight": W}
        return torch.func.functional_call(MODEL, whole, (X,)).square().mean()

    return torch.func.grad(loss)(weights[f"{path}.weight"])


def test_riemannian_is_scaled_gradient_descent() -> None:
    params, grads = situation()
    found = ll.precondition(grads, params, "riemannian", delta=0.1)
    for path in params:
        (A, B), (gA, gB) = pair(params, path), pair(grads, path)
        eye = 0.1 * torch.eye(3, dtype=torch.float64)
        close(found[path]["lora_A"], torch.linalg.solve(B.mT @ B + eye, gA), 1e-10)
        close(found[path]["lora_B"], torch.linalg.solve(A @ A.mT + eye, gB.mT).mT, 1e-10)
    # its step doesn't change when A grows and B shrinks by the same invertible matrix
    path = next(iter(params))
    (A, B), M = pair(params, path), torch.randn(3, 3, dtype=torch.float64) + 2 * torch.eye(3)
    other = ll.from_dict(
        {**ll.to_dict(params), path: {"lora_A": M @ A, "lora_B": B @ torch.linalg.inv(M)}}, params
    )
    steps = []
    for p in (params, other):
        g = ll.grad(lambda p: ll.apply(MODEL, p, X).square().mean())(p)
        (A, B), (dA, dB) = pair(p, path), pair(ll.precondition(g, p, delta=0.0), path)
        steps.append(dB @ A + B @ dA)
    close(steps[0], steps[1], 1e-8)


def test_lora_fa_projects_the_full_gradient_on_As_rows() -> None:
    params, _ = situation()
    t, frozen = ll.partition(params, lambda path, name: name == "lora_B")
    grads = ll.grad(lambda t: ll.apply(MODEL, ll.combine(t, frozen), X).square().mean())(t)
    found = ll.precondition(grads, params, "lora_fa", delta=0.0)
    for path in params:
        A, _ = pair(params, path)
        s = params.sites[path].scaling
        G = full_gradient(params, path)
        close(s * found[path]["lora_B"] @ A, G @ torch.linalg.pinv(A) @ A, 1e-9)
    assert [*ll.to_dict(found)[path]] == ["lora_B"]


def test_lora_pro_makes_the_step_nearest_to_the_full_gradient() -> None:
    params, grads = situation()
    found = ll.precondition(grads, params, "lora_pro", delta=0.0)
    for path in params:
        (A, B), (gA, gB), (hA, hB) = pair(params, path), pair(grads, path), pair(found, path)
        s = params.sites[path].scaling
        G = full_gradient(params, path)
        close(gA, s * B.mT @ G, 1e-9)
        PB, PA = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
        eye = torch.eye
        rest = (eye(len(PB)).to(PB) - PB) @ G @ (eye(len(PA)).to(PA) - PA)
        close(s * (hB @ A + B @ hA), G - rest, 1e-8)  # the theorem

        # no other X makes a pair nearer to (g_A, g_B): the slope in X is zero
        slope = (hA - gA) @ A.mT - B.mT @ (hB - gB)
        assert slope.abs().max() < 1e-8 * max(1.0, (hA - gA).norm().item())


@pytest.mark.parametrize("how", ["riemannian", "lora_pro"])
def test_stacks_tuples_starts_and_transforms(how: Any) -> None:
    params, grads = situation()
    other = moved(ll.init(MODEL, ll.LoRAConfig(r=3, alpha=9)), 7, 0.5)
    stack, slopes = ll.stack([params, other]), ll.stack([grads, params])
    alone = [ll.precondition(grads, params, how, delta=0.1)]
    found = ll.precondition(pytree.tree_map(torch.clone, _as(slopes, stack)), stack, how, delta=0.1)
    for path in params:
        for name in ("lora_A", "lora_B"):
            close(found[0][path][name], alone[0][path][name], 1e-9)
    (one,) = ll.precondition((grads,), (params,), how, delta=0.1)
    close(one, alone[0], 0.0)
    pissa, g = situation(ll.PiSSAConfig(r=3))
    t, _ = ll.partition(g)
    made = ll.precondition(t, pissa, how, delta=0.1)
    assert [*ll.to_dict(made)["layers.0.up"]] == ["lora_A", "lora_B"]

    def f(g: Any) -> Any:
        return ll.precondition(g, params, how, delta=0.1)

    close(torch.func.jvp(f, (grads,), (grads,))[1], alone[0], 1e-9)  # linear in the gradients
    doubled = pytree.tree_map(lambda t: torch.stack([t, 2 * t]), grads)
    close(
        pytree.tree_map(lambda t: t[1], torch.func.vmap(f)(doubled)),
        pytree.tree_map(lambda t: 2 * t, alone[0]),
        1e-9,
    )

    def through(p: Any) -> Tensor:
        return torch.stack(
            [t.square().sum() for t in leaves(ll.precondition(grads, p, how, delta=0.1))]
        ).sum()

    v = pytree.tree_map(torch.randn_like, params)
    h = 1e-6
    ahead, behind = (
        through(pytree.tree_map(lambda t, d, s=s: t + s * d, params, v)) for s in (h, -h)
    )
    close(torch.func.jvp(through, (params,), (v,))[1], (ahead - behind) / (2 * h), 1e-5)


def _as(tree: ll.Adapter, like: ll.Adapter) -> ll.Adapter:
    """The leaves of a tree, and of `like` the strengths."""
    plain = ll.to_dict(like)
    return ll.from_dict(
        {path: {**plain[path], **tensors} for path, tensors in ll.to_dict(tree).items()}, like
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, g: ll.precondition(g, p, "adam"), ll.ConfigError, "how: expected one of"),
        (lambda p, g: ll.precondition(g, p, delta=-1.0), ll.ConfigError, "delta: expected at"),
        (
            lambda p, g: ll.precondition(g, p, "lora_fa"),
            ll.StructureError,
            "is for a frozen lora_A",
        ),
        (
            lambda p, g: ll.precondition(ll.partition(g, lambda _, n: n == "lora_B")[0], p),
            ll.StructureError,
            "needs a gradient of lora_A",
        ),
        (
            lambda p, g: ll.precondition(g, ll.partition(p, lambda _, n: n == "lora_B")[0]),
            ll.StructureError,
            "lora_A is absent from params",
        ),
        (
            lambda p, g: ll.precondition(g, ll.init(MODEL, ll.LoRAConfig(target_names="up"))),
            ll.StructureError,
            "of another adapter",
        ),
        (
            lambda p, g: ll.precondition(*[ll.init(MODEL, ll.DoRAConfig(r=2))] * 2),
            ll.UnsupportedError,
            "dora's update isn't a product",
        ),
    ],
)
def test_what_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call(*situation())


def test_a_config_freezes_A_and_the_backward_pass_keeps_no_input(tmp_path: Path) -> None:
    params = moved(ll.init(MODEL, ll.LoRAConfig(r=3, frozen_A=True)))
    t, frozen = ll.partition(params)
    assert [*ll.to_dict(t)["layers.0.up"]] == ["lora_B"]

    def loss(t: Any) -> Tensor:
        return ll.apply(MODEL, ll.combine(t, frozen), X).square().mean()

    close(ll.grad(loss)(t), torch.func.grad(loss)(t), 1e-12)
    ll.precondition(ll.grad(loss)(t), params, "lora_fa")
    bound = ll.bind(MODEL, params)
    names = {name.rpartition(".")[2] for name, p in bound.named_parameters() if p.requires_grad}
    assert names == {"lora_B"}
    ll.save(params, tmp_path / "a")
    assert ll.load(tmp_path / "a", MODEL).config.frozen_A
    with pytest.raises(ll.StructureError, match="frozen_A"):
        ll.stack([params, moved(ll.init(MODEL, ll.LoRAConfig(r=3)))])
    layer, x = nn.Sequential(nn.Linear(64, 4)), torch.randn(256, 64)
    kept = {}
    for freeze in (False, True):
        one = ll.bind(layer, ll.init(layer, ll.LoRAConfig(r=2, frozen_A=freeze)))
        kept[freeze] = any(t.numel() == x.numel() for t in _saved(one, x))
    assert kept == {False: True, True: False}
    table = nn.Sequential(nn.Embedding(5, 4))
    with pytest.raises(ll.UnsupportedError, match="on an embedding lora_A starts at zero"):
        ll.init(table, ll.LoRAConfig(r=2, frozen_A=True, target_kinds="embedding"))


def _saved(module: nn.Module, x: Tensor) -> list[Tensor]:
    """What a call keeps for its backward pass."""
    held: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        held.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        module(x)
    return held
