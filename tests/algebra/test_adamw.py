"""AdamW as a function: differentiated in all it takes, rates by leaf, torch's fused kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from helpers import close, leaves, moved, net, normal
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import lora_lite_func as ll

X = normal(6, 16, seed=5)
MODEL = net(depth=1)


def adapter(seed: int = 0) -> ll.Adapter:
    return moved(ll.init(MODEL, ll.LoRAConfig(r=2), seed=seed), seed)


def loss(params: Any) -> Tensor:
    return ll.apply(MODEL, params, X).square().mean()


def two_steps(params: Any, lr: Any = 0.1, decay: Any = 0.01) -> Tensor:
    """The loss after two updates, of which the second has a state."""
    optimizer = ll.adamw(lr, weight_decay=decay)
    state = optimizer.init(params)
    for _ in range(2):
        params, state = optimizer.update(grad(loss)(params), state, params)
    return loss(params)


def slope(f: Any, at: Tensor) -> float:
    h = 1e-6
    return float((f(at + h) - f(at - h)) / (2 * h))


def test_a_step_is_differentiated_in_parameters_and_rates() -> None:
    params = adapter()
    v = pytree.tree_map(lambda t: torch.randn_like(t) * 0.1, params)
    zero, rate = torch.zeros((), dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)

    def along(c: Tensor) -> Tensor:
        return two_steps(pytree.tree_map(lambda t, v: t + c * v, params, v))

    functions = {
        "parameters": (along, zero),
        "lr": (lambda c: two_steps(params, lr=c), rate),
        "weight_decay": (lambda c: two_steps(params, decay=c), rate),
        "lr of a name": (lambda c: two_steps(params, lr={"lora_B": c, "default": 0.05}), rate),
    }
    for name, (f, at) in functions.items():
        wanted = slope(f, at)
        assert abs(float(grad(f)(at)) - wanted) < 1e-5 * max(1, abs(wanted)), name
        assert abs(float(jvp(f, (at,), (torch.ones_like(at),))[1]) - wanted) < 1e-5 * max(
            1, abs(wanted)
        ), name
        several = torch.stack([at, at + 0.01])
        close(vmap(f)(several), torch.stack([f(c) for c in several]), 1e-9)


def test_by_ordinary_autograd_too() -> None:
    params = adapter()
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    optimizer = ll.adamw(rate)
    after, _ = optimizer.update(grad(loss)(params), optimizer.init(params), params)
    loss(after).backward()
    wanted = grad(lambda lr: _one_step(params, lr))(rate.detach())
    close(rate.grad, wanted, 1e-10)
    with torch.no_grad():
        after, state = optimizer.update(params, optimizer.init(params), params)
    assert not any(t.requires_grad for t in leaves((after, state)))


def _one_step(params: ll.Adapter, lr: Any) -> Tensor:
    optimizer = ll.adamw(lr)
    return loss(optimizer.update(grad(loss)(params), optimizer.init(params), params)[0])


def test_a_leaf_without_gradient_has_finite_derivatives() -> None:
    fresh = ll.init(MODEL, ll.LoRAConfig(r=2))  # B = 0, so that A's first gradient is zero
    assert all(t.isfinite().all() for t in leaves(grad(lambda p: _one_step(p, 0.1))(fresh)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_the_fused_update_is_the_formulas(dtype: torch.dtype, lr: Any) -> None:
    params = ll.cast(adapter(), dtype)
    grads = pytree.tree_map(lambda t: torch.randn_like(t), params)
    optimizer = ll.adamw(lr, weight_decay=0.1)
    state = optimizer.init(params)
    before = pytree.tree_map(torch.clone, (params, state))
    tol = 1e-12 if dtype is torch.float64 else 4 * torch.finfo(dtype).eps
    p = q = params
    other = state
    for _ in range(3):
        p, state = optimizer.update(grads, state, p)
        stacked = pytree.tree_map(lambda t: t[None], (grads, other, q))
        q, other = (
            pytree.tree_map(lambda t: t[0], each) for each in vmap(optimizer.update)(*stacked)
        )
        close((p, state), (q, other), tol)
        assert all(t.dtype == dtype for t in leaves(p))
    close((params, optimizer.init(params)), before, 0.0)  # nothing was written on


def test_donated_memory_is_written_on_and_the_numbers_are_the_same() -> None:
    params, grads = adapter(), adapter(1)
    optimizer = ll.adamw(1e-2)
    wanted = optimizer.update(grads, optimizer.init(params), params)
    mine = pytree.tree_map(torch.clone, params)
    places = [t.data_ptr() for t in leaves(mine)]
    found = optimizer.update(grads, optimizer.init(mine), mine, donate=True)
    close(found, wanted, 0.0)
    assert [t.data_ptr() for t in leaves(found[0])] == places
    tracked = grad(lambda p: loss(optimizer.update(grads, optimizer.init(p), p, donate=True)[0]))(
        params
    )
    assert all(bool(g.any()) for g in leaves(tracked))


def test_a_graph_of_an_update() -> None:
    torch._dynamo.reset()
    params, grads = adapter(), adapter(1)
    optimizer = ll.adamw(1e-2)
    state = optimizer.init(params)
    step = torch.compile(optimizer.update, backend="eager", fullgraph=True)
    close(step(grads, state, params), optimizer.update(grads, state, params), 1e-10)
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------- rates and trees
def test_rates_by_name_are_lora_plus() -> None:
    params, grads = adapter(), adapter(1)
    optimizer = ll.adamw({"lora_B": 0.16, "default": 0.01}, weight_decay={"default": 0.0})
    found, _ = optimizer.update(grads, optimizer.init(params), params)
    for path, tensors in params.items():
        for name, rate in (("lora_A", 0.01), ("lora_B", 0.16)):
            plain = ll.adamw(rate)
            wanted, _ = plain.update(grads, plain.init(params), params)
            close(found[path][name], wanted[path][name], 1e-12)
            assert not torch.equal(found[path][name], tensors[name])
    stack = ll.stack([params, grads])
    each = ll.adamw({"lora_A": torch.tensor([0.1, 0.2]), "lora_B": 0.3})
    found, _ = each.update(stack, each.init(stack), stack)
    for i, rate in enumerate((0.1, 0.2)):
        plain = ll.adamw({"lora_A": rate, "lora_B": 0.3})
        wanted, _ = plain.update(stack[i], plain.init(stack[i]), stack[i])
        close(found[i], wanted, 1e-6)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"lora_C": 0.1, "default": 0.1}, "adamw: lr: no leaf is named 'lora_C'"),
        ({"lora_B": 0.1}, "expected a rate for lora_A, or one for 'default'"),
        ({"lora_A": torch.ones(2), "default": 1.0}, r"adamw: lr: 'layers.0.down' lora_A: expected"),
    ],
)
def test_rates_that_do_not_fit_are_refused(rates: Any, message: str) -> None:
    with pytest.raises(ll.StructureError, match=message):
        ll.adamw(rates).init(adapter())
    good = ll.adamw(0.1)
    with pytest.raises(ll.StructureError, match=message):
        good.update(adapter(), good.init(adapter()), adapter(), lr=rates)
    with pytest.raises(ll.ConfigError, match="adamw: lr: expected a number of at least 0"):
        ll.adamw({"default": -1.0})


def test_tuples_and_dicts_of_adapters() -> None:
    other = moved(ll.init(MODEL, ll.IA3Config()))
    params = {"a": adapter(), "b": [other]}
    t, frozen = ll.partition(params)
    close(ll.combine(t, frozen), params, 0.0)
    assert isinstance(t["b"], list)

    def both(t: Any) -> Tensor:
        return loss(ll.combine(t, frozen))

    grads = ll.grad(both)(t)
    clipped, norm = ll.clip_grads(grads, 0.5)
    close(norm, torch.stack([g.square().sum() for g in leaves(grads)]).sum().sqrt(), 1e-12)
    close(clipped, pytree.tree_map(lambda g: g * (0.5 / (norm + 1e-6)).clamp(max=1), grads), 1e-12)
    optimizer = ll.adamw(0.1)
    moved_on, _ = optimizer.update(grads, optimizer.init(t), t)
    for key, get in (("a", lambda x: x["a"]), ("b", lambda x: x["b"][0])):
        wanted, _ = optimizer.update(get(grads), optimizer.init(get(t)), get(t))
        close(get(moved_on), wanted, 1e-12)
        assert isinstance(get(moved_on), ll.Adapter), key
    for wrong in ({"a": grads["a"]}, [grads], {"a": grads["a"], "b": grads["a"]}):
        with pytest.raises(ll.StructureError, match=r"adamw: gradients: expected"):
            optimizer.update(wrong, optimizer.init(t), t)
    with pytest.raises(ll.StructureError, match="combine: expected a dict of a, b as in the first"):
        ll.combine(t, {"a": frozen["a"]})
    with pytest.raises(ll.StructureError, match="single adapters, or stacks of one size"):
        ll.clip_grads((adapter(), ll.stack([adapter(), adapter()])), 1.0)


def test_a_rate_is_followed_on_a_leaf_that_is_one_number() -> None:
    model = nn.Linear(8, 8, dtype=torch.float64)
    params = moved(ll.init(model, ll.GLoRAConfig(r=2)))  # its bias has numbers
    x = torch.randn(4, 8, dtype=torch.float64)

    def after(rate: Any) -> torch.Tensor:
        optimizer = ll.adamw(rate)
        grads = ll.grad(lambda p: ll.apply(model, p, x).square().mean())(params)
        made = optimizer.update(grads, optimizer.init(params), params)[0]
        return ll.apply(model, made, x).square().mean()

    rate, h = torch.tensor(0.05, dtype=torch.float64), 1e-5
    slope = (after(0.05 + h) - after(0.05 - h)) / (2 * h)
    assert (torch.func.jvp(after, (rate,), (torch.ones_like(rate),))[1] - slope).abs() < 1e-6
    assert (torch.func.grad(after)(rate) - slope).abs() < 1e-6
    assert (torch.func.vmap(after)(rate.expand(2))[1] - after(0.05)).abs() < 1e-10
