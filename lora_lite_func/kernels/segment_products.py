"""Views of one segment's rows and members, and products on them.

A segment of one member gives matrices, one of several members gives batches of matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .segments import Segment

__all__ = ["add_branch", "add_product", "leaves_of", "members_of", "product", "rows_of"]


def rows_of(segment: Segment, tokens: int, t: Tensor) -> Tensor:
    """The segment's rows of a sorted batch (N tokens, ..., d): a view (m, n, d), or (n, d) of one
    member.
    """
    members = segment.high - segment.low
    if not segment.whole:
        t = t.narrow(0, segment.start * tokens, members * segment.width * tokens)
    if members == 1:
        return t if t.ndim == 2 else t.view(-1, t.shape[-1])
    return t if segment.width == 1 and t.ndim == 3 else t.view(members, -1, t.shape[-1])


def members_of(segment: Segment, t: Tensor) -> Tensor:
    """The segment's members of a tensor (K, ...): a view (m, ...), or (...) of one member."""
    if segment.high - segment.low == 1:
        return t.select(0, segment.low)
    return t if segment.whole else t.narrow(0, segment.low, segment.high - segment.low)


def leaves_of(segment: Segment, leaves: Tensor) -> Tensor:
    """The segment's members and ranks of leaves (K, r, d): a view (m, r, d), or (r, d) of one
    member.
    """
    leaves = members_of(segment, leaves)
    if segment.ranks is not None:
        first, last = segment.ranks
        leaves = leaves.narrow(-2, first, min(last, leaves.shape[-2]) - first)
    return leaves


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, of matrices or of batches, without the case distinctions of torch.matmul."""
    return torch.mm(a, b, out=out) if a.ndim == 2 else torch.bmm(a, b, out=out)


def add_product(y: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
    """Make y beta y + alpha a b, in place, of matrices or of batches."""
    if y.ndim == 2:
        y.addmm_(a, b, alpha=alpha, beta=beta)
    else:
        y.baddbmm_(a, b, alpha=alpha, beta=beta)


def add_branch(
    segment: Segment,
    tokens: int,
    y: Tensor,
    X: Tensor,
    A: Tensor,
    B: Tensor,
    s: float | Tensor,
    beta: float = 1.0,
) -> Tensor:
    """Make the segment's rows of y (N tokens, d_out) beta y + s (X A^T) B^T, in place.

    Returns A X^T (m, r, n), times s where s isn't a float.

    Args:
        segment: whose rows and members.
        tokens: how many rows of y and X a row of the batch has.
        y: (N tokens, ..., d_out), written on.
        X: (N tokens, ..., d_in), the sorted batch.
        A: (K, r, d_in).
        B: (K, d_out, r).
        s: a float, or (K, 1, 1).
        beta: what y is multiplied by before.
    """
    # A X^T rather than X A^T, because it is up to twice as fast with the long side inside.
    h = product(leaves_of(segment, A), rows_of(segment, tokens, X).mT)
    alpha = 1.0
    if isinstance(s, float):
        alpha = s
    else:
        h.mul_(members_of(segment, s))
    add_product(rows_of(segment, tokens, y), h.mT, leaves_of(segment, B.mT), alpha, beta)
    return h
