"""What an adapter costs a forward of one to 2,048 tokens: `ll.apply`, `ll.functional`, a bound or
prepared model and PEFT over the bare base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import lora_lite_func as ll

from .harness import Row, Suite, llama, token_ids
from .peers import PROJECTIONS, lora, lora_lite, noisy, peft_adapted, peft_lora

_ROTATED: dict[str, tuple[ll.AdapterConfig, str, dict[str, Any]]] = {
    "DoRA r=8": (
        ll.DoRAConfig(r=8, target_names=tuple(PROJECTIONS)),
        "LoraConfig",
        {"r": 8, "use_dora": True},
    ),
    "OFT, blocks of 32": (
        ll.OFTConfig(block_size=32, target_names=tuple(PROJECTIONS)),
        "OFTConfig",
        {"oft_block_size": 32},
    ),
    "HRA r=8": (ll.HRAConfig(r=8, target_names=tuple(PROJECTIONS)), "HRAConfig", {"r": 8}),
}
"""Methods that make something of their tensors before they act, here and in PEFT."""


def area(suite: Suite) -> Iterator[Row]:
    """One token through eight layers; 512 and 2,048 tokens through four, to rank 64."""
    yield from _decode(suite)
    for name in _ROTATED:
        yield _made_once(suite, name)
    base = llama(1 if suite.quick else 4, device=suite.device)
    for tokens, ranks in ((128, (8,)), (512, (8, 64)), (2048, (8,))):
        for r in ranks:
            yield _long(suite, base, tokens, r)


def _decode(suite: Suite) -> Iterator[Row]:
    base = llama(2 if suite.quick else 8, device=suite.device)
    params, other, lite = lora(base), peft_lora(base), lora_lite(base, suite.lora_lite)
    bound, f = ll.bind(base, params), ll.functional(base, params)
    ids = torch.zeros(1, 1, dtype=torch.long, device=suite.device)
    calls = {
        "base": lambda: base(ids),
        "bound": lambda: bound(ids),
        "functional": lambda: f(params, ids),
        "apply": lambda: ll.apply(base, params, ids),
        "PEFT": lambda: other(ids),
    }
    if lite is not None:
        calls["lora-lite"] = lambda: lite(ids)
    with torch.no_grad():
        found = suite.compare(calls, inner=5)
    ratios = found.ratios
    peers = found.peers("PEFT", "lora-lite")
    yield Row("1 token, bound", ratios["bound"], "base", 1.10, guard=found.guard, peers=peers)
    yield Row("1 token, bound", found.over("bound", "PEFT"), "PEFT", 0.93, guard=found.guard)
    yield Row(
        "1 token, functional (a copy is kept)",
        ratios["functional"],
        "base",
        1.10,
        guard=found.guard,
        peers=peers,
    )
    yield Row(
        "1 token, apply (the tree is copied)",
        ratios["apply"],
        "base",
        guard=found.guard,
        peers=peers,
    )


def _made_once(suite: Suite, name: str) -> Row:
    base = llama(2 if suite.quick else 8, device=suite.device)
    config, theirs, fields = _ROTATED[name]
    params = noisy(ll.init(base, config))
    once, other = ll.prepared(base, params), peft_adapted(base, theirs, **fields)
    lite = lora_lite(base, suite.lora_lite, method=params.layout.variant.name)
    ids = torch.zeros(1, 1, dtype=torch.long, device=suite.device)
    calls = {"base": lambda: base(ids), "prepared": lambda: once(ids), "PEFT": lambda: other(ids)}
    if lite is not None:
        calls["lora-lite"] = lambda: lite(ids)
    with torch.no_grad():
        found = suite.compare(calls, inner=2)
    return Row(
        f"1 token, {name}, prepared",
        found.ratios["prepared"],
        "base",
        guard=found.guard,
        peers=found.peers("PEFT", "lora-lite"),
    )


def _long(suite: Suite, base: torch.nn.Module, tokens: int, r: int) -> Row:
    params, other, lite = lora(base, r), peft_lora(base, r), lora_lite(base, suite.lora_lite, r)
    bound = ll.bind(base, params)
    ids = token_ids(tokens, suite.device)
    calls = {"base": lambda: base(ids), "bound": lambda: bound(ids), "PEFT": lambda: other(ids)}
    if lite is not None:
        calls["lora-lite"] = lambda: lite(ids)
    with torch.no_grad():
        found = suite.compare(calls)
    target = 1.03 if tokens >= 512 else None
    return Row(
        f"{tokens} tokens, r={r}, bound",
        found.ratios["bound"],
        "base",
        target,
        guard=found.guard,
        peers=found.peers("PEFT", "lora-lite"),
    )
