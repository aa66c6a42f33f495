"""Entries of a d_out x d_in matrix as a frozen leaf (2, n): their rows and columns.

Stored as float32 numbers, exact up to 2^24, since torch.func.grad refuses a tree with an integer leaf.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.method import ParamSpec
from ..core.random import generator

__all__ = ["dense", "drawn", "pack", "spec", "unpack"]


def spec(n: int) -> ParamSpec:
    """The leaf of n entries."""
    return ParamSpec((2, n), trainable=False, dtype=torch.float32)


def pack(flat: Tensor, d_in: int) -> Tensor:
    """The leaf, from entry numbers row * d_in + column."""
    return torch.stack([flat // d_in, flat % d_in]).to(torch.float32)


@functools.lru_cache(maxsize=8)
def drawn(seed: int, n: int, d_out: int, d_in: int) -> Tensor:
    """The leaf of n different entries, drawn from the seed and the sizes alone, in the order drawn."""
    return pack(
        torch.randperm(d_out * d_in, generator=generator(seed, f"{d_out} {d_in}", "positions"))[:n],
        d_in,
    )


def unpack(leaf: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) as integers, (n,) each.

    Raises:
        UnsupportedError: the leaf was rounded to a dtype that can't hold it.
    """
    if leaf.dtype not in (torch.float32, torch.float64):
        raise UnsupportedError(
            f"positions are stored as float32 or float64, found {leaf.dtype}, where they are "
            f"rounded; "
            "change an adapter's dtype with ll.cast before ll.bind, not the bound module's with "
            ".to() or .half()"
        )
    rows, columns = leaf.long().unbind(-2)
    return rows, columns


def dense(leaf: Tensor, values: Tensor, d_out: int, d_in: int) -> Tensor:
    """The (d_out, d_in) matrix with these values (n,) at these entries, zero elsewhere."""
    rows, columns = unpack(leaf)
    return (
        torch.zeros(d_out * d_in, dtype=values.dtype, device=values.device)
        .scatter(0, rows * d_in + columns, values)
        .view(d_out, d_in)
    )
