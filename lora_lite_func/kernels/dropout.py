"""Dropout by a seed: which entries of an input are kept, the same in every mode that has a seed.

A call draws one number from torch's CPU generator, which `torch.manual_seed`, checkpoints and
forked generators control. The mask follows from that number and the input's shape alone. So the
fused kernels keep no mask, and `jvp`, `vmap` and plain calls of one seed drop the same entries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.torch_internals import (
    draws_differ,
    is_traced,
    is_tracing_here,
    is_watched,
    outside_transforms,
)

__all__ = ["draw_seed", "dropped", "gain", "mask", "seed_of"]

_LEVELS = 1 << 16
"""Probabilities are rounded to one of this many levels. One draw of 64 bits then decides on four
entries; on a CPU, drawing takes most of the time of dropout.
"""


def draw_seed() -> Tensor:
    """A number () int64 from torch's CPU generator."""
    return torch.randint(1 << 62, (), device="cpu")


def seed_of(drawn: Tensor) -> int | None:
    """The drawn number, or None where vmap drew a different one for each member."""
    return None if draws_differ(drawn) else int(drawn)


def dropped(x: Tensor, p: float) -> Tensor:
    """x with entries dropped at probability p and the others times `gain(p)`, in x's shape and
    dtype.

    A graph (compiled, exported, traced) can't hold a number that is drawn while it is made, and
    with `vmap(randomness="different")` each member needs its own mask: there torch draws, as
    `torch.nn.functional.dropout` does.
    """
    if is_tracing_here() or is_traced() or is_watched() or not _is_plain(x):
        return F.dropout(x, p)
    seed = seed_of(draw_seed())
    if seed is None:
        return F.dropout(x, p)
    return x * mask(x, p, seed, gain(p))


def gain(p: float) -> float:
    """What inverted dropout multiplies the kept entries by, 1 / (1 - p)."""
    return _LEVELS / (_LEVELS - _level(p))


def mask(x: Tensor, p: float, seed: int, kept: float = 1.0) -> Tensor:
    """`kept` where an entry of x is kept and 0 where it is dropped, in x's shape and dtype; the
    same for the same seed.
    """
    with outside_transforms():  # a vmap over gradients draws nothing
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
        draws.random_(-(1 << 63), None, generator=torch.Generator(x.device).manual_seed(seed))
        lanes = draws.view(torch.int16)[: x.numel()].view(x.shape)
        made = (lanes >= _level(p) - _LEVELS // 2).to(x.dtype)
        return made if kept == 1.0 else made.mul_(kept)


def _level(p: float) -> int:
    return min(round(p * _LEVELS), _LEVELS - 1)


def _is_plain(x: Tensor) -> bool:
    own_memory = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    return own_memory and x.layout is torch.strided and not x.is_meta
