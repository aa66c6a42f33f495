"""Random starts: every draw is a function of (seed, path, name) alone.

Draws are made on the CPU, whatever the model's device, so other sites or devices change none.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .torch_internals import is_tracing_here

__all__ = ["Draw", "generator", "kaiming", "kept", "normal", "uniform"]

Draw = Callable[[Sequence[int], torch.Generator], Tensor]
"""A random start: (shape, generator) -> float32 CPU tensor of that shape."""


def generator(seed: int, path: str, name: str) -> torch.Generator:
    """A fresh CPU generator for one tensor, seeded by a stable hash of (seed, path, name)."""
    digest = hashlib.blake2b(f"{seed}\0{path}\0{name}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def kaiming(shape: Sequence[int], gen: torch.Generator) -> Tensor:
    """Uniform in +-1/sqrt(n), n the last dimension: the usual start of lora_A, which torch has as
    `kaiming_uniform_(a=sqrt(5))`.
    """
    return uniform(1.0 / math.sqrt(max(shape[-1], 1)))(shape, gen)


def uniform(bound: float) -> Draw:
    """Uniform in [-bound, bound)."""
    return lambda shape, gen: _empty(shape).uniform_(-bound, bound, generator=gen)


def normal(std: float) -> Draw:
    """Gaussian with mean 0 and standard deviation `std`."""
    return lambda shape, gen: _empty(shape).normal_(0.0, std, generator=gen)


def kept(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A draw of seeds and sizes whose last few results are kept.

    What is made in place of a tensor (fake ones, those of an export) is of that call alone.
    """
    found: OrderedDict[Any, Tensor] = OrderedDict()

    @functools.wraps(draw)
    def drawn(*key: Any) -> Tensor:
        if is_tracing_here():
            return draw(*key)
        made = found.get(key)
        if made is None:
            made = found[key] = draw(*key)
            while len(found) > _KEPT:
                found.popitem(last=False)
        return made

    return drawn


_KEPT = 8


def _empty(shape: Sequence[int]) -> Tensor:
    # spelt out, since the caller's defaults must have no part in a draw
    return torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
