"""Calls in some threads while others compile and export: each is what it is alone."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import close, leaves, moved
from torch import Tensor, nn

import lora_lite_func as ll

CALLS = int(os.environ.get("LORA_LITE_FUNC_THREADED_CALLS", "300"))
"""How many calls each test makes in all."""


class Reading(nn.Module):
    """Calls its layers, reads the weight of one, and has an embedding, a norm and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.up = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.mix = nn.Conv1d(12, 12, 1)
        self.down = nn.Linear(12, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)  # (N, T, 8)
        h = self.norm(torch.tanh(self.up(x)))
        h = h + self.mix(h.mT).mT
        return x + self.down(h) + F.linear(h, self.down.weight)


CONFIGS = {
    "lora": ll.LoRAConfig(r=2, target_kinds=("embedding", "linear", "conv")),
    "dora": ll.DoRAConfig(r=2),
    "hra": ll.HRAConfig(r=2),
    "full": ll.FullConfig(target_parameters=(r"(norm|mix)\.weight$",)),
}


def model_of(seed: int = 0) -> Reading:
    """A model in float64, whose results differ by rounding alone."""
    torch.manual_seed(seed)
    return Reading().double().eval()


IDS = torch.randint(0, 7, (3, 4), generator=torch.Generator().manual_seed(0))
Uses = dict[str, Callable[[], Any]]


def uses(cfg: ll.AdapterConfig) -> Uses:
    """Calls of each kind, which give the same values each time."""
    model = model_of()
    params = moved(ll.init(model, cfg))
    apart = ll.init(model, dataclasses.replace(cfg, exclude_names=("down",)))  # whose rows are told
    several = ll.stack([moved(apart, seed) for seed in (2, 3)])
    bound, prepared = ll.bind(model, params), ll.prepared(model, params)
    learned = [p for p in bound.parameters() if p.requires_grad]
    trainable, frozen = ll.partition(params)

    def loss(t: Any) -> Tensor:
        return ll.apply(model, ll.combine(t, frozen), IDS).square().mean()

    def quiet(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return call()

        return run

    return {
        "apply": lambda: ll.apply(model, params, IDS).detach(),
        "apply without a graph": quiet(lambda: ll.apply(model, params, IDS)),
        "bound": quiet(lambda: bound(IDS)),
        "backward": lambda: torch.autograd.grad(bound(IDS).square().mean(), learned),
        "prepared": quiet(lambda: prepared(IDS)),
        "rows": quiet(lambda: ll.apply(model, ll.rows(several, [1, 0, -1]), IDS)),
        "rows in training": lambda: ll.apply(model, ll.rows(several, [1, 0, 1]), IDS).detach(),
        "grad": lambda: torch.func.grad(loss)(trainable),
        "merge": quiet(lambda: ll.merge(model, params)),
    }


def compiles(stop: threading.Event, began: threading.Event) -> None:
    """Compile and export models with and without adapters, again and again."""
    model = model_of(1)
    params = moved(ll.init(model, ll.LoRAConfig(r=2)), 3)
    bound = ll.bind(model, params)
    n = 0
    while not stop.is_set():
        torch._dynamo.reset()
        began.set()
        compiled: Any = torch.compile(
            [lambda x, n=n: x.sin() + n, lambda x: bound(x), lambda x: ll.apply(model, params, x)][
                n % 3
            ],
            backend="eager",
        )
        compiled(IDS)
        torch.export.export(nn.Tanh() if n % 2 else bound, (IDS if not n % 2 else torch.ones(2),))
        n += 1


@pytest.mark.parametrize("name", CONFIGS)
def test_calls_while_another_thread_compiles_and_exports(name: str) -> None:
    calls = uses(CONFIGS[name])
    wanted = {use: call() for use, call in calls.items()}
    stop, began, failed = threading.Event(), threading.Event(), list[str]()

    def work() -> None:
        began.wait(60)
        for i in range(CALLS // (2 * len(CONFIGS))):
            use = list(calls)[i % len(calls)]
            try:
                close(leaves(calls[use]()), leaves(wanted[use]), 1e-12)
            except Exception as error:  # counted, with what it was
                failed.append(f"{use}: {type(error).__name__}: {str(error)[:200]}")

    def compiling() -> None:
        try:
            compiles(stop, began)
        except Exception as error:
            failed.append(f"compiling: {type(error).__name__}: {str(error)[:300]}")
            began.set()

    other = threading.Thread(target=compiling)
    workers = [threading.Thread(target=work) for _ in range(2)]
    for thread in (other, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    other.join()
    torch._dynamo.reset()
    assert not failed, f"{len(failed)} wrong, such as {failed[:3]}"
