"""A training step, forward and backward: over the frozen base's (activation gradients alone), which
bounds any adapter's, and PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import lora_lite_func as ll

from .harness import Row, Suite, llama, token_ids
from .peers import PROJECTIONS, lora, lora_lite, noisy, peft_adapted, peft_lora


def area(suite: Suite) -> Iterator[Row]:
    """LoRA over the base and PEFT; DoRA over our LoRA and PEFT's; HRA over PEFT's, and how its cost
    grows with the rank.
    """
    base = llama(1 if suite.quick else 4, device=suite.device)
    for tokens, r in ((64, 8), (512, 8), (512, 64), (2048, 8)):
        yield from _lora(suite, base, tokens, r)
    yield from _dora(suite, base)
    yield from _hra(suite, base)


def embedded(base: Any, tokens: int, device: str) -> Tensor:
    """Embeddings of random tokens (1, tokens, h), of which the step takes the gradient: so backward
    goes through every layer.
    """
    return base.get_input_embeddings()(token_ids(tokens, device)).detach().requires_grad_()


def step(model: Callable[..., Any], x: Tensor, trained: list[Tensor]) -> Callable[[], Any]:
    """A call that takes the gradients of a sum of the logits."""
    return lambda: torch.autograd.grad(model(inputs_embeds=x).logits.mean(), [x, *trained])


def ours(base: Any, params: ll.Adapter, x: Tensor) -> Callable[[], Any]:
    """The step of a bound model: what is trained are its parameters."""
    bound = ll.bind(base, params)
    return step(bound, x, [p for p in bound.parameters() if p.requires_grad])


def theirs(model: Any, x: Tensor) -> Callable[[], Any]:
    """The step of a model under PEFT or lora-lite."""
    return step(model, x, [p for p in model.parameters() if p.requires_grad])


def _lite(
    suite: Suite, base: Any, x: Tensor, r: int = 8, method: str = "lora"
) -> dict[str, Callable[[], Any]]:
    """lora-lite's step, where there is a checkout of it."""
    model = lora_lite(base, suite.lora_lite, r, method)
    return {} if model is None else {"lora-lite": theirs(model, x)}


def _lora(suite: Suite, base: Any, tokens: int, r: int) -> Iterator[Row]:
    x = embedded(base, tokens, suite.device)
    calls = {
        "base": step(base, x, []),
        "ours": ours(base, lora(base, r), x),
        "PEFT": theirs(peft_lora(base, r), x),
        **_lite(suite, base, x, r),
    }
    found = suite.compare(calls)
    limit = 1.06 if r == 8 else 1 + 3 * r / 512 + 0.03
    target = limit if tokens >= 512 else None
    yield Row(
        f"LoRA r={r}, {tokens} tokens",
        found.ratios["ours"],
        "base",
        target,
        guard=found.guard,
        peers=found.peers("PEFT", "lora-lite"),
    )
    if tokens >= 512 and r == 8:
        yield Row(
            f"LoRA r={r}, {tokens} tokens",
            found.over("ours", "PEFT"),
            "PEFT",
            0.75,
            guard=found.guard,
        )


def _dora(suite: Suite, base: Any) -> Iterator[Row]:
    dora = noisy(ll.init(base, ll.DoRAConfig(r=8, alpha=16, target_names=tuple(PROJECTIONS))))
    for tokens in (64, 512):
        x = embedded(base, tokens, suite.device)
        calls = {
            "LoRA": ours(base, lora(base), x),
            "DoRA": ours(base, dora, x),
            "PEFT": theirs(peft_lora(base, use_dora=True), x),
            **_lite(suite, base, x, method="dora"),
        }
        found = suite.compare(calls)
        yield Row(
            f"DoRA r=8, {tokens} tokens",
            found.ratios["DoRA"],
            "our LoRA",
            1.2,
            guard=found.guard,
            peers=found.peers("PEFT", "lora-lite"),
        )
        yield Row(
            f"DoRA r=8, {tokens} tokens", found.over("DoRA", "PEFT"), "PEFT", 0.6, guard=found.guard
        )


def _hra(suite: Suite, base: Any) -> Iterator[Row]:
    def hra(r: int) -> ll.Adapter:
        return noisy(ll.init(base, ll.HRAConfig(r=r, target_names=tuple(PROJECTIONS))))

    x = embedded(base, 512, suite.device)
    calls = {
        "r=2": ours(base, hra(2), x),
        "r=8": ours(base, hra(8), x),
        "r=32": ours(base, hra(32), x),
    }
    found = suite.compare(calls)
    yield Row("HRA r=32, 512 tokens", found.ratios["r=32"], "its r=2", 1.3, guard=found.guard)
    calls = {
        "base": step(base, x, []),
        "ours": calls["r=8"],
        "PEFT": theirs(peft_adapted(base, "HRAConfig", r=8), x),
        **_lite(suite, base, x, method="hra"),
    }
    found = suite.compare(calls)
    yield Row(
        "HRA r=8, 512 tokens",
        found.ratios["ours"],
        "base",
        guard=found.guard,
        peers=found.peers("PEFT", "lora-lite"),
    )
    yield Row(
        "HRA r=8, 512 tokens, PEFT's over ours",
        found.over("PEFT", "ours"),
        "ours",
        7,
        at_least=True,
        guard=found.guard,
    )
