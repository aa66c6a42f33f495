"""Honest ratios: everything in one process, rounds interleaved, medians of per-round ratios, a base-against-base guard."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

GUARD = (0.97, 1.03)
"""A run is void where base against base, measured as if they were two, is outside these."""


@dataclass(frozen=True)
class Result:
    """Ratios to the first contestant, per name; `guard` is the second copy of that first one."""

    ratios: Mapping[str, float]
    seconds: Mapping[str, float]
    guard: float

    @property
    def void(self) -> bool:
        """Whether the machine was too noisy for the ratios to mean anything."""
        return not GUARD[0] <= self.guard <= GUARD[1]


def compare(contestants: Mapping[str, Callable[[], Any]], *, rounds: int = 21, inner: int = 1, warmup: int = 3) -> Result:
    """Time each contestant once a round, in turn; the first is the base, and runs twice (A/A guard).

    Args:
        contestants: {name: a call}; all must be ready to run.
        rounds: how many interleaved rounds (at least 15 for a figure that is reported).
        inner: calls per measurement; raise it for calls under a millisecond.
        warmup: rounds that aren't counted.
    """
    base = next(iter(contestants))
    calls = {**contestants, "\0guard": contestants[base]}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(inner):
                call()
            spent = (time.perf_counter() - start) / inner
            if turn >= warmup:
                times[name].append(spent)
    ratios = {n: statistics.median(t / b for t, b in zip(ts, times[base], strict=True)) for n, ts in times.items()}
    guard = ratios.pop("\0guard")
    return Result(ratios, {n: statistics.median(times[n]) for n in ratios}, guard)


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    packages = ("torch", "optree", "safetensors", "transformers", "peft", "numpy")
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": found,
    }


def llama(layers: int, hidden: int = 512, seed: int = 0) -> Any:
    """A random-weight Llama decoder: ffn 1376 at hidden 512, 8 heads, vocabulary 1024, eval mode, base not trainable."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1024,
        max_position_embeddings=4096,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)
