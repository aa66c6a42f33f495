"""How the cost of a call grows: with the sites, the rank, the tokens, the adapters of a batch, and
the adapters that the process holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import lora_lite_func as ll

from .harness import Result, Row, Suite, llama, token_ids
from .peers import lora, lora_lite, peft_lora


def area(suite: Suite) -> Iterator[Row]:
    """Lines for plots, each a ratio to the bare base of the same size."""
    yield from _sites(suite)
    base = llama(1 if suite.quick else 4, device=suite.device)
    with torch.no_grad():
        yield from _rank(suite, base)
        yield from _tokens(suite, base)
        yield from _members(suite, base)
        yield from _held(suite, base)


class _Chain(nn.Module):
    """So many small linear layers, one after another."""

    def __init__(self, count: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _bound(found: Result, peers: dict[str, float], curve: tuple[str, str, float]) -> Row:
    """A point of a bound model's curve."""
    ratio = found.ratios["bound"]
    return Row("bound", ratio, "time over the base's", guard=found.guard, peers=peers, curve=curve)


def _sites(suite: Suite) -> Iterator[Row]:
    for count in (8, 64) if suite.quick else (8, 32, 128, 512, 2000):
        model = _Chain(count).to(suite.device)
        params = ll.init(model, ll.LoRAConfig(r=8))
        bound, x = ll.bind(model, params), torch.zeros(16, 64, device=suite.device)
        calls = {
            "base": lambda m=model, x=x: m(x),
            "bound": lambda m=bound, x=x: m(x),
            "apply": lambda m=model, p=params, x=x: ll.apply(m, p, x),
        }
        with torch.no_grad():
            found = suite.compare(calls, inner=max(1, 200 // count))
        curve = ("forward against the number of sites", "sites of width 64", float(count))
        peers = {"apply": found.ratios["apply"]}
        yield _bound(found, peers, curve)


def _rank(suite: Suite, base: Any) -> Iterator[Row]:
    ids = token_ids(512, suite.device)
    for r in (2, 32) if suite.quick else (2, 8, 32, 128, 256):
        bound, other = ll.bind(base, lora(base, r)), peft_lora(base, r)
        lite = lora_lite(base, suite.lora_lite, r)
        calls = {
            "base": lambda: base(ids),
            "bound": lambda m=bound: m(ids),
            "PEFT": lambda m=other: m(ids),
        }
        if lite is not None:
            calls["lora-lite"] = lambda m=lite: m(ids)
        found = suite.compare(calls)
        curve = ("forward of 512 tokens against the rank", "rank", float(r))
        yield _bound(found, found.peers("PEFT", "lora-lite"), curve)


def _tokens(suite: Suite, base: Any) -> Iterator[Row]:
    bound, other = ll.bind(base, lora(base)), peft_lora(base)
    lite = lora_lite(base, suite.lora_lite)
    for tokens in (1, 64) if suite.quick else (1, 8, 64, 256, 1024):
        ids = token_ids(tokens, suite.device)
        calls = {
            "base": lambda ids=ids: base(ids),
            "bound": lambda ids=ids: bound(ids),
            "PEFT": lambda ids=ids: other(ids),
        }
        if lite is not None:
            calls["lora-lite"] = lambda ids=ids: lite(ids)
        found = suite.compare(calls, inner=5 if tokens < 64 else 1)
        curve = ("forward of LoRA r=8 against the tokens", "tokens", float(tokens))
        yield _bound(found, found.peers("PEFT", "lora-lite"), curve)


def _members(suite: Suite, base: Any) -> Iterator[Row]:
    rows = 16 if suite.quick else 1024
    ids = torch.zeros(rows, 1, dtype=torch.long, device=suite.device)
    one = lora(base)
    for count in (1, 8) if suite.quick else (1, 16, 64, 256, 1024):
        bound = ll.bind(base, ll.rows(ll.stack([one] * count), torch.arange(rows) * count // rows))
        found = suite.compare({"base": lambda: base(ids), "rows": lambda m=bound: m(ids)})
        curve = (
            f"decode of {rows} rows against the adapters in the batch",
            "adapters",
            float(count),
        )
        yield Row(
            "rows, bound",
            found.ratios["rows"],
            "time over the base's",
            guard=found.guard,
            curve=curve,
        )


def _held(suite: Suite, base: Any) -> Iterator[Row]:
    ids, params, held = token_ids(1, suite.device), lora(base), []
    for count in (1, 8) if suite.quick else (1, 64, 512):
        held += [lora(base) for _ in range(count - len(held))]
        found = suite.compare(
            {"base": lambda: base(ids), "apply": lambda: ll.apply(base, params, ids)}, inner=5
        )
        curve = ("apply against the adapters in memory", "adapters in the process", float(count))
        yield Row(
            "apply, 1 token",
            found.ratios["apply"],
            "time over the base's",
            guard=found.guard,
            curve=curve,
        )
