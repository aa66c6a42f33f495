"""Every verb that claims to be pure x grad, jvp, vmap and its arguments as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from helpers import close, leaves, moved, net, normal
from torch import Tensor
from torch.func import grad, jvp, vmap

import lora_lite_func as ll

MODEL = net(width=8, inner=16, depth=1, out=4)
X = normal(3, 8, seed=5)
OTHER = moved(ll.init(MODEL, ll.LoRAConfig(r=2), seed=9), 9)
WIDE = ll.init(MODEL, ll.LoRAConfig(r=4, alpha=3))
THIRD = moved(OTHER)
STACK = ll.stack([OTHER, THIRD])
NAMED = ll.stack({"a": OTHER, "b": THIRD})


def per_sample(p: Any, batch: Tensor = X) -> Any:
    return ll.per_sample_grads(MODEL, p, lambda y, b: y.square().mean(1), batch)


def adamw(p: Any) -> Any:
    optimizer = ll.adamw(0.1, weight_decay=0.1)
    return optimizer.update(OTHER, optimizer.init(p), p)[0]


def halves(p: Any) -> Any:
    a, b = ll.partition(p, lambda path, name: name == "lora_A")
    return ll.combine(ll.scale(ll.combine(a, b), 2.0)), a


VERBS: dict[str, Callable[[Any], Any]] = {
    "apply": lambda p: ll.apply(MODEL, p, X),
    "functional_call": lambda p: ll.functional_call(MODEL, (p, OTHER), X),
    "rows": lambda p: ll.apply(MODEL, ll.rows(ll.stack([OTHER, p]), [1, 0, 1]), X),
    "merge": lambda p: ll.merge(MODEL, p),
    "scale": lambda p: ll.scale(p, 0.5),
    "scale_of_a_stack": lambda p: ll.scale(ll.stack([p, p]), torch.tensor([0.5, 2.0])),
    "partition_combine": halves,
    "add": lambda p: ll.add(p, OTHER),
    "cat": lambda p: ll.combine_adapters([p, OTHER], [0.5, -1.0]),
    "linear": lambda p: ll.combine_adapters([p, OTHER], [0.5, -1.0], "linear"),
    "svd": lambda p: ll.merge(MODEL, ll.combine_adapters([p, OTHER], None, "svd", r=4)),
    "ties": lambda p: ll.combine_adapters([p, OTHER], None, "ties", density=1.0),
    "magnitude_prune": lambda p: ll.combine_adapters([p, OTHER], None, "magnitude_prune"),
    "dare_linear": lambda p: ll.combine_adapters([p, OTHER], None, "dare_linear"),
    "stack": lambda p: ll.stack([p, OTHER]),
    "stack_of_other_ranks": lambda p: ll.stack([p, WIDE]),
    "unstack": lambda p: ll.unstack(ll.stack([OTHER, p]))[1],
    "update": lambda p: ll.update(STACK, 1, p),
    "update_by_name": lambda p: ll.update(NAMED, "b", p),
    "concatenate": lambda p: ll.concatenate([STACK, ll.stack([p])]),
    "mean": lambda p: ll.mean(ll.stack([p, OTHER]), [0.25, 0.75]),
    "cast": lambda p: ll.cast(p, torch.float64),
    "to_dict": ll.to_dict,
    "from_dict": lambda p: ll.from_dict(ll.to_dict(p), p.layout),
    "ravel": lambda p: ll.ravel(p)[0],
    "unravel": lambda p: ll.ravel(p)[1](ll.ravel(p)[0] * 2),
    "clip_grads": lambda p: ll.clip_grads(p, 0.5),
    "adamw": adamw,
    "precondition": lambda p: ll.precondition(OTHER, p, delta=0.1),
    "lora_pro": lambda p: ll.precondition(OTHER, p, "lora_pro", delta=0.1),
    "grad": ll.grad(lambda p: ll.apply(MODEL, p, X).square().mean()),
    "value_and_grad": ll.value_and_grad(lambda p: ll.apply(MODEL, p, X).square().mean()),
    "per_sample_grads": per_sample,
}


def floats(tree: Any) -> list[Tensor]:
    return [t for t in leaves(tree) if isinstance(t, Tensor)]


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_under_every_transform(verb: str) -> None:
    f = VERBS[verb]
    params = moved(ll.init(MODEL, ll.LoRAConfig(r=2), seed=1), 1)
    v = pytree.tree_map(
        lambda t: torch.randn(t.shape, generator=torch.Generator().manual_seed(t.numel())).to(t),
        params,
    )
    before = [(t.clone(), t._version) for t in leaves(params)]
    value = floats(f(params))
    h = 1e-6
    ahead, behind = (
        floats(f(pytree.tree_map(lambda t, d, s=s: t + s * d, params, v))) for s in (h, -h)
    )
    wanted = [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)]
    made, slopes = jvp(lambda p: floats(f(p)), (params,), (v,))
    close(made, value, 1e-10)
    close(slopes, wanted, 1e-5)

    weights = [torch.randn_like(t) for t in value]

    def total(p: Any) -> Tensor:
        return torch.stack(
            [(w * t).sum() for w, t in zip(weights, floats(f(p)), strict=True)]
        ).sum()

    back = grad(total)(params)
    along = torch.stack([(a * b).sum() for a, b in zip(leaves(back), leaves(v), strict=True)]).sum()
    close(
        along,
        torch.stack([(w * s).sum() for w, s in zip(weights, slopes, strict=True)]).sum(),
        1e-9,
    )
    ordinary = torch.autograd.grad(
        total(live := pytree.tree_map(lambda t: t.clone().requires_grad_(), params)), leaves(live)
    )
    close(ordinary, leaves(back), 1e-9)

    several = [params, pytree.tree_map(lambda t, d: t + 0.1 * d, params, v)]
    stacked = pytree.tree_map(lambda *ts: torch.stack(ts), *several)
    mapped = vmap(lambda p: floats(f(p)))(stacked)
    for i, one in enumerate(several):
        close([t[i] for t in mapped], floats(f(one)), 1e-9)
    close(
        vmap(grad(total))(stacked),
        pytree.tree_map(lambda *ts: torch.stack(ts), *map(grad(total), several)),
        1e-9,
    )
    assert all(
        torch.equal(t, old) and t._version == version
        for t, (old, version) in zip(leaves(params), before, strict=True)
    )


def test_strengths_and_weights_are_followed_too() -> None:
    values = torch.tensor([0.5, -0.75], dtype=torch.float64)
    functions: dict[str, Callable[[Tensor], Any]] = {
        "scale": lambda w: ll.scale(OTHER, w[0]),
        "stack": lambda w: ll.scale(STACK, w),
        "cat": lambda w: ll.combine_adapters([OTHER, THIRD], w),
        "list": lambda w: ll.combine_adapters([OTHER, THIRD], [w[0], 2.0 * w[1]]),
        "linear": lambda w: ll.combine_adapters([OTHER, THIRD], w, "linear"),
        "svd": lambda w: ll.merge(MODEL, ll.combine_adapters([OTHER, THIRD], w, "svd", r=4)),
        "mean": lambda w: ll.mean(STACK, w),
        "clip_grads": lambda w: ll.clip_grads(STACK, w.abs()),
        "adamw": lambda w: ll.adamw(w.abs()).update(STACK, ll.adamw(0.1).init(STACK), STACK)[0],
    }
    v, h = torch.tensor([1.0, 2.0], dtype=torch.float64), 1e-6
    for name, f in functions.items():
        _, slopes = jvp(lambda w, f=f: floats(f(w)), (values,), (v,))
        ahead, behind = (floats(f(values + s * v)) for s in (h, -h))
        wanted = [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)]
        assert any(bool(s.any()) for s in slopes), name
        close(slopes, wanted, 1e-5)
        both = vmap(lambda w, f=f: floats(f(w)))(torch.stack([values, 2 * values]))
        close([t[1] for t in both], floats(f(2 * values)), 1e-9)


@pytest.mark.parametrize("config", [ll.OFTConfig(block_size=4), ll.IA3Config(), ll.DoRAConfig(r=2)])
def test_scale_cast_and_project_of_other_methods(config: ll.AdapterConfig) -> None:
    params = moved(ll.init(MODEL, config))
    verbs: list[Callable[[Any], Any]] = [lambda p: ll.scale(p, 0.5)]
    if params.layout.variant.project is not None:
        verbs.append(ll.project)
    t, frozen = ll.partition(params)
    v = pytree.tree_map(torch.ones_like, t)
    for f in verbs:
        _, slopes = jvp(lambda t, f=f: floats(f(ll.combine(t, frozen))), (t,), (v,))
        h = 1e-6
        ahead, behind = (
            floats(f(ll.combine(pytree.tree_map(lambda t, s=s: t + s, t), frozen))) for s in (h, -h)
        )
        close(slopes, [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)], 1e-5)


# ------------------------------------------------------------------------------------- per sample
def test_per_sample_grads_in_a_graph_and_in_trees() -> None:
    torch._dynamo.reset()
    params = moved(ll.init(MODEL, ll.LoRAConfig(r=2)))
    compiled = torch.compile(per_sample, backend="eager", fullgraph=True)
    close(compiled(params, X), per_sample(params), 1e-10)
    torch._dynamo.reset()
    gates = moved(ll.init(MODEL, ll.IA3Config()))
    found = per_sample({"a": params, "b": (gates,)})
    both = ll.grad(lambda p: ll.apply(MODEL, p, X[1:2]).square().mean(1).sum())(
        {"a": params, "b": (gates,)}
    )
    close(pytree.tree_map(lambda t: t[1], found), both, 1e-10)


def test_per_sample_grads_have_tangents_in_the_batch() -> None:
    v = torch.ones_like(X)
    _, slopes = jvp(lambda x: floats(per_sample(OTHER, x)), (X,), (v,))
    h = 1e-6
    ahead, behind = (floats(per_sample(OTHER, X + s * v)) for s in (h, -h))
    close(slopes, [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)], 1e-5)
