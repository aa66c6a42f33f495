"""Features in blocks of equal size: the check that they divide, and products with them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.torch_internals import first_of, is_traced, may_overwrite
from .cost import costs_on

__all__ = ["check_divides", "plus_product", "product", "together", "widened"]


def check_divides(
    method: str, knob: str, size: int, width: int, what: str, *, even: bool = False
) -> None:
    """Refuse a width that isn't a whole number of blocks.

    Args:
        method: the method that asks, for the message.
        knob: the config's field that sets the size.
        size: the size of a block (or the number of equal parts).
        width: what is divided.
        what: its name ("d_in", "d_out", "r").
        even: whether to suggest even sizes only.

    Raises:
        UnsupportedError: the width doesn't divide; the message names the sizes that fit.
    """
    if width % size == 0:
        return
    fitting = [
        b for b in range(2, min(width, 4 * size) + 1) if width % b == 0 and not (even and b % 2)
    ]
    near = sorted(sorted(fitting, key=lambda b: abs(b - size))[:3])
    hint = (
        f"{knob}={' or '.join(map(str, near))} fits"
        if near
        else "none fits: leave the layer out with exclude_names"
    )
    raise UnsupportedError(
        f"{method} cuts {what} into equal blocks, expected it divisible by {knob}={size}, found "
        f"{what}={width}; {hint}"
    )


def product(x: Tensor, M: Tensor) -> Tensor:
    """x blockdiag(M) in x's dtype, for row vectors x (..., n b) and M (n, b, b); M (1, b, b) is the
    same block everywhere.
    """
    n, b, _ = M.shape
    blocks = x.unflatten(-1, (-1, b))  # (..., n, b)
    M = M.to(x.dtype)
    if n == 1:
        return (blocks @ M[0]).flatten(-2)
    return torch.einsum("...nk,nkc->...nc", blocks, M).flatten(-2)


def plus_product(x: Tensor, M: Tensor) -> Tensor:
    """x + x blockdiag(M), as in `product`; where M is zero, exactly x, in memory layout too."""
    if M.shape[0] == 1 or not x.is_contiguous():
        return x + product(x, M)
    M = M.to(x.dtype)
    n, b, _ = M.shape
    if may_overwrite() and x.numel():
        y = x.clone()
        _by_block(y, n, b).baddbmm_(_by_block(x, n, b), M)
        return y
    blocks = _by_block(x, n, b)
    return torch.baddbmm(blocks, blocks, M).transpose(0, 1).reshape(x.shape)


def _by_block(x: Tensor, n: int, b: int) -> Tensor:
    """Row vectors x (..., n b), contiguous, as a view (n, T, b)."""
    return x.view(-1, n, b).transpose(0, 1)


def together(n: int, b: int, device: torch.device) -> int:
    """How many of n blocks of size b to multiply as one: as many as cost no more than one alone.

    One where a graph is recorded, which would keep the zeros between them.
    """
    costs = costs_on(device)
    if costs is None or torch.is_grad_enabled() or is_traced():
        return 1
    return first_of((k for k in range(costs.block_width // b, 1, -1) if n % k == 0), 1)


def widened(M: Tensor) -> Tensor:
    """The same block diagonal (n, b, b) as fewer and larger blocks, by `together`."""
    n, b, _ = M.shape
    k = together(n, b, M.device)
    if k == 1:
        return M
    apart = torch.eye(k, dtype=M.dtype, device=M.device).view(k, 1, k, 1)
    return (M.reshape(n // k, k, b, 1, b) * apart).reshape(n // k, k * b, k * b)
