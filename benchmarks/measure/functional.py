"""The functional route beside the bound one: a gradient step, its memory, calls on a model of many
modules, the optimizer as a function.

python -m benchmarks --only functional
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import lora_lite_func as ll

from .harness import Row, Suite, llama, peak, token_ids
from .peers import lora, lora_lite, peft_lora
from .sets import stack_of
from .train import embedded

__all__ = ["area"]


def area(suite: Suite) -> Iterator[Row]:
    """Every figure."""
    yield from _step(suite)
    yield from _many_modules(suite)
    yield from _optimizer(suite)


Call = Callable[[], Any]


def _backward(model: Any, x: Tensor) -> Call:
    """The step of a module that holds what it trains."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        for p in trained:
            p.grad = None
        model(inputs_embeds=x).logits.mean().backward()

    return step


def _steps(base: Any, params: ll.Adapter, x: Tensor) -> tuple[dict[str, Call], Call]:
    """The bound model's step and the functional one; torch.func's, which is for no target."""
    f = ll.functional(base, params)

    def loss(p: ll.Adapter) -> Tensor:
        mean: Tensor = f(p, inputs_embeds=x).logits.mean()
        return mean

    ours, transformed = ll.value_and_grad(loss), torch.func.grad_and_value(loss)
    calls = {"bound": _backward(ll.bind(base, params), x), "functional": lambda: ours(params)}
    return calls, lambda: transformed(params)


def _step(suite: Suite) -> Iterator[Row]:
    base = llama(2 if suite.quick else 8, device=suite.device)
    x, params = embedded(base, 512, suite.device).detach(), lora(base)
    calls, transformed = _steps(base, params, x)
    calls |= {"torch.func": transformed, "PEFT": _backward(peft_lora(base), x)}
    lite = lora_lite(base, suite.lora_lite)
    if lite is not None:
        calls["lora-lite"] = _backward(lite, x)
    found = suite.compare(calls)
    peers = found.peers("torch.func", "PEFT", "lora-lite")
    what = "ll.value_and_grad, 512 tokens"
    yield Row(
        what, found.ratios["functional"], "bound backward", 1.05, guard=found.guard, peers=peers
    )
    most = {name: peak(call) for name, call in calls.items()}
    bound = most["bound"]
    yield Row(
        f"{what}, memory at its peak",
        most["functional"] / bound,
        "bound backward",
        1.05,
        peers={name: most[name] / bound for name in peers},
    )


def _many_modules(suite: Suite) -> Iterator[Row]:
    """A narrow Llama of 1,011 modules, 504 of them adapted."""
    base = llama(4 if suite.quick else 72, 64, device=suite.device)
    count = f"{sum(1 for _ in base.modules()):,} modules"
    params, ids = lora(base), token_ids(1, suite.device)
    bound, f = ll.bind(base, params), ll.functional(base, params)
    with torch.no_grad():
        found = suite.compare(
            {
                "bound": lambda: bound(ids),
                "functional": lambda: f(params, ids),
                "apply": lambda: ll.apply(base, params, ids),
            }
        )
    yield Row(
        f"ll.functional, 1 token, {count}",
        found.ratios["functional"],
        "bound",
        guard=found.guard,
        peers={"ll.apply": found.ratios["apply"]},
    )
    x = embedded(base, 64, suite.device).detach()
    calls, transformed = _steps(base, params, x)
    found = suite.compare({**calls, "torch.func": transformed})
    yield Row(
        f"ll.value_and_grad, 64 tokens, {count}",
        found.ratios["functional"],
        "bound backward",
        1.10,
        guard=found.guard,
        peers={"torch.func": found.ratios["torch.func"]},
    )


def _optimizer(suite: Suite) -> Iterator[Row]:
    base = llama(4, device=suite.device)
    stack = stack_of(base, [8] * (8 if suite.quick else 64))
    grads = pytree.tree_map(torch.randn_like, stack)
    leaves = [t.clone().requires_grad_() for t in pytree.tree_leaves(stack)]
    for t, g in zip(leaves, pytree.tree_leaves(grads), strict=True):
        t.grad = g.clone()
    fused, pure = torch.optim.AdamW(leaves, fused=True), ll.adamw(1e-3)
    own: dict[str, Any] = {"donated": pytree.tree_map(torch.clone, stack)}
    own["state"] = pure.init(own["donated"])
    kept = pure.init(stack)

    def donating() -> None:
        own["donated"], own["state"] = pure.update(grads, own["state"], own["donated"], donate=True)

    found = suite.compare(
        {
            "fused": fused.step,
            "donating": donating,
            "copying": lambda: pure.update(grads, kept, stack),
        }
    )
    yield Row(
        f"ll.adamw on {ll.num_members(stack)} stacked adapters, donate=True",
        found.ratios["donating"],
        "torch's fused AdamW",
        1.2,
        guard=found.guard,
        peers={"without": found.ratios["copying"]},
    )
