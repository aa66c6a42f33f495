"""Features in blocks of equal size: the check that they divide, and a row vector times a block-diagonal matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedError

__all__ = ["check_divides", "plus_product", "product"]


def check_divides(method: str, knob: str, size: int, width: int, what: str, *, even: bool = False) -> None:
    """Refuse a width that isn't a whole number of blocks.

    Args:
        method: who asks, for the message.
        knob: the config's field that sets the size.
        size: of a block (or how many equal parts).
        width: what is divided.
        what: its name ("d_in", "d_out", "r").
        even: only suggest even sizes.

    Raises:
        UnsupportedError: with the sizes that fit.
    """
    if width % size == 0:
        return
    fitting = [b for b in range(2, min(width, 4 * size) + 1) if width % b == 0 and not (even and b % 2)]
    near = sorted(sorted(fitting, key=lambda b: abs(b - size))[:3])
    hint = f"{knob}={' or '.join(map(str, near))} fits" if near else "none fits: leave the layer out with exclude_names"
    raise UnsupportedError(f"{method} cuts {what} into equal blocks, expected it divisible by {knob}={size}, found {what}={width}; {hint}")


def product(x: Tensor, M: Tensor) -> Tensor:
    """x blockdiag(M), for row vectors x (..., n b) and M (n, b, b), or (1, b, b) for the same block everywhere; in x's dtype."""
    n, b, _ = M.shape
    blocks = x.unflatten(-1, (-1, b))  # (..., n, b)
    M = M.to(x.dtype)
    if n == 1:
        return (blocks @ M[0]).flatten(-2)
    return torch.einsum("...nk,nkc->...nc", blocks, M).flatten(-2)


def plus_product(x: Tensor, M: Tensor) -> Tensor:
    """x + x blockdiag(M), as `product`; exactly x where M is zero, its memory layout too."""
    n, b, _ = M.shape
    if n == 1 or not x.is_contiguous():
        return x + product(x, M)
    blocks = x.reshape(-1, n, b).transpose(0, 1)  # (n, T, b)
    return torch.baddbmm(blocks, blocks, M.to(x.dtype)).transpose(0, 1).reshape(x.shape)
