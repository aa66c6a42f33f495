"""Indices as frozen leaves: ids (k,), or rows and columns (2, n) of a matrix's entries.

They are floating numbers, since torch.func.grad refuses a tree with an integer leaf: float32, which
is exact up to 2^24, and float64 where a layer is larger than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.method import ParamSpec
from ..core.random import generator, kept

__all__ = ["decoded", "dense", "drawn", "index_dtype", "pack", "spec", "unpack"]

_EXACT = 2**24
"""Up to this number, float32 holds every whole number."""


def index_dtype(size: int) -> torch.dtype:
    """The dtype of a leaf of indices below `size`: float32, or float64 where that would round."""
    return torch.float32 if size <= _EXACT else torch.float64


def spec(n: int, d_out: int, d_in: int) -> ParamSpec:
    """The leaf (2, n) of n entries of a (d_out, d_in) matrix."""
    return ParamSpec((2, n), trainable=False, dtype=index_dtype(max(d_out, d_in)))


def pack(flat: Tensor, d_in: int) -> Tensor:
    """The leaf's values (2, n), as integers, from entry numbers row * d_in + column (n,)."""
    return torch.stack([flat // d_in, flat % d_in])


@kept
def drawn(seed: int, n: int, d_out: int, d_in: int) -> Tensor:
    """The leaf's values for n different entries, drawn from the seed and the sizes alone, in the
    order drawn.
    """
    source = generator(seed, f"{d_out} {d_in}", "positions")
    return pack(torch.randperm(d_out * d_in, generator=source)[:n], d_in)


def decoded(leaf: Tensor, size: int) -> Tensor:
    """A leaf of indices below `size` as integers.

    Raises:
        UnsupportedError: the leaf was rounded to a dtype that can't hold them.
    """
    if torch.promote_types(leaf.dtype, index_dtype(size)) != leaf.dtype:
        raise UnsupportedError(
            f"indices below {size} are stored as {index_dtype(size)} or wider, found {leaf.dtype}, "
            f"where they are rounded; change an adapter's dtype with ll.cast before ll.bind, not "
            f"the bound module's with .to() or .half()"
        )
    return leaf.long()


def unpack(leaf: Tensor, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """(rows, columns) as integers, (n,) each, of a leaf (2, n).

    Raises:
        UnsupportedError: the leaf was rounded to a dtype that can't hold it.
    """
    rows, columns = decoded(leaf, max(d_out, d_in)).unbind(-2)
    return rows, columns


def dense(leaf: Tensor, values: Tensor, d_out: int, d_in: int) -> Tensor:
    """The (d_out, d_in) matrix with these values (n,) at these entries, zero elsewhere.

    Raises:
        UnsupportedError: the leaf was rounded to a dtype that can't hold the indices.
    """
    rows, columns = unpack(leaf, d_out, d_in)
    zeros = torch.zeros(d_out * d_in, dtype=values.dtype, device=values.device)
    return zeros.scatter(0, rows * d_in + columns, values).view(d_out, d_in)
