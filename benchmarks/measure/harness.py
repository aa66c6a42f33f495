"""Honest ratios: everything in one process, rounds interleaved, medians of per-round ratios, and a
guard, the base against itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = (0.97, 1.03)
"""A run is void where base against base, measured as if they were two, is outside these."""


@dataclass(frozen=True)
class Result:
    """Ratios to the first contestant, per name; `guard` is the second copy of that first one."""

    ratios: Mapping[str, float]
    seconds: Mapping[str, float]
    guard: float
    times: Mapping[str, Sequence[float]]

    def over(self, one: str, other: str) -> float:
        """The median of one contestant's time over another's, round by round."""
        return statistics.median(
            a / b for a, b in zip(self.times[one], self.times[other], strict=True)
        )

    def peers(self, *names: str) -> dict[str, float]:
        """The ratios of those contestants that took part."""
        return {name: self.ratios[name] for name in names if name in self.ratios}

    @property
    def void(self) -> bool:
        """Whether the machine was too noisy for the ratios to mean anything."""
        return not GUARD[0] <= self.guard <= GUARD[1]


@dataclass(frozen=True)
class Suite:
    """How a run is made: what an area's `area(suite)` is given.

    quick: few rounds, for a look; nothing that it prints is to be reported.
    device: where the models are.
    lora_lite: a checkout of lora-lite to measure beside, if one was given.
    """

    quick: bool = False
    device: str = "cpu"
    lora_lite: Path | None = None

    def compare(self, contestants: Mapping[str, Callable[[], Any]], *, inner: int = 1) -> Result:
        """`compare` with this run's rounds and device; what the guard voids is done again, up to
        three times.
        """
        for _ in range(1 if self.quick else 3):
            result = compare(
                contestants,
                rounds=3 if self.quick else 15,
                inner=inner,
                warmup=1 if self.quick else 3,
                device=self.device,
            )
            if not result.void:
                break
        return result


@dataclass(frozen=True)
class Row:
    """One figure: what, its value, the target.

    Args:
        what: a few words; with the area's name they say what was done.
        value: a ratio (or a count, or seconds: `over` says).
        over: what it is a ratio to.
        target: at most this (at least, with `at_least`); None where none is set.
        at_least: whether more is better.
        guard: base against base in the same run; None where nothing was timed.
        peers: {name: the same figure for another implementation}.
        curve: (title, x name, x) of a figure that belongs to a line in a plot; `what` then names
            the line.
    """

    what: str
    value: float
    over: str
    target: float | None = None
    at_least: bool = False
    guard: float | None = None
    peers: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[str, str, float] | None = None

    @property
    def verdict(self) -> str:
        """void, reached, missed, or nothing where no target is set."""
        if self.guard is not None and not GUARD[0] <= self.guard <= GUARD[1]:
            return "void"
        if self.target is None:
            return ""
        return (
            "reached"
            if (self.value >= self.target if self.at_least else self.value <= self.target)
            else "missed"
        )


def compare(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 21,
    inner: int = 1,
    warmup: int = 3,
    device: str | torch.device = "cpu",
) -> Result:
    """Time each contestant once a round, in turn; the first is the base, and runs twice (A/A
    guard).

    Args:
        contestants: {name: a call}; all must be ready to run.
        rounds: how many interleaved rounds (at least 15 for a figure that is reported).
        inner: calls per measurement; raise it for calls under a millisecond.
        warmup: rounds that aren't counted.
        device: where they run; an accelerator's work is waited for.
    """
    _keep_memory()
    base = next(iter(contestants))
    calls = {**contestants, "\0guard": contestants[base]}
    times: dict[str, list[float]] = {name: [] for name in calls}
    wait = _wait(torch.device(device))
    for turn in range(warmup + rounds):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(inner):
                call()
            wait()
            spent = (time.perf_counter() - start) / inner
            if turn >= warmup:
                times[name].append(spent)
    ratios = {
        n: statistics.median(t / b for t, b in zip(ts, times[base], strict=True))
        for n, ts in times.items()
    }
    guard = ratios.pop("\0guard")
    return Result(ratios, {n: statistics.median(times[n]) for n in ratios}, guard, times)


@functools.cache
def _keep_memory() -> None:
    """Let the C library keep what is freed, as a long-lived process ends up doing by itself:
    otherwise pages are handed back and faulted in again by whoever allocates next, and ratios tell
    of that (seen: a factor of ten in an elementwise operation).
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, size in (
            (-3, 1 << 25),
            (-1, (1 << 31) - 1),
            (-2, 1 << 26),
        ):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, size)


def _wait(device: torch.device) -> Callable[[], None]:
    """What returns when the device has done what it was told."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What the numbers were taken on."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "system": platform.platform(),
        "device": name,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def versions() -> dict[str, str]:
    """Python's version and those of the packages that have a part in the numbers, where they are
    installed.
    """
    found = {"python": platform.python_version()}
    for name in (
        "lora-lite-func",
        "torch",
        "optree",
        "safetensors",
        "transformers",
        "peft",
        "numpy",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def llama(layers: int, hidden: int = 512, seed: int = 0, device: str = "cpu") -> Any:
    """A random-weight Llama decoder: ffn 1376 at hidden 512, 8 heads, vocabulary 1024, eval mode,
    base not trainable.
    """
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
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(device)


def token_ids(count: int, device: str) -> Tensor:
    """One row (1, count) of `llama`'s vocabulary, always the same."""
    return torch.randint(0, 1024, (1, count), generator=torch.Generator().manual_seed(0)).to(device)


def saved(call: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """Bytes that a forward keeps for the backward pass, in distinct storages other than those of
    `held`.
    """
    known = {t.untyped_storage().data_ptr() for t in held}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        # keeps the storage alive, so no address comes twice, but no graph: a node would hold itself
        # for good
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = call()
    del kept
    return sum(found.values())


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that storages made in a call take at once."""
    with _Live() as live:
        kept = call()
    del kept
    return live.most


class _Live(TorchDispatchMode):
    """What is made by operations inside, for as long as it lives.

    Attributes:
        most: the most bytes at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if id(storage) not in self._known | given:
                self._note(storage)
        return out

    def _note(self, storage: Any) -> None:
        self._known.add(id(storage))
        weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(tree: Any) -> list[Any]:
    tensors = (t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor))
    return [t.untyped_storage() for t in tensors if t.layout is torch.strided]
