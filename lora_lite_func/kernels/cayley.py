"""Rotations from a few free numbers: skew matrices and their Cayley transform, minus the identity.

    R = (I + Q)(I - Q)^-1,   E = R - I = 2 (I - Q)^-1 Q,   exactly zero at Q = 0

The strict upper triangle of Q, row by row, is the vector q. R(-q) is R(q)^T, its inverse.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Kind", "minus_identity", "pairs", "skew"]

Kind = Literal["exact", "neumann"]


def pairs(b: int) -> int:
    """How many numbers a b x b skew matrix has: b (b - 1) / 2."""
    return b * (b - 1) // 2


def skew(q: Tensor, b: int) -> Tensor:
    """The skew matrix (..., b, b) with strict upper triangle q (..., b (b - 1) / 2)."""
    row, column = torch.triu_indices(b, b, 1, device=q.device)
    upper = (
        q.new_zeros(*q.shape[:-1], b * b).index_add(-1, row * b + column, q).unflatten(-1, (b, b))
    )
    return upper - upper.mT


def minus_identity(q: Tensor, b: int, kind: Kind = "exact") -> Tensor:
    """E = R - I, (..., b, b), of q (..., b (b - 1) / 2), in q's dtype (float32 at least, for
    precision).

    Args:
        q: strict upper triangles.
        b: size of a block.
        kind: "exact" (closed forms up to b = 4, one batched inverse beyond), or "neumann", the
            series I + 2Q + 2Q^2 + 2Q^3 + Q^4 that OFTv2 uses, which is nearly orthogonal while Q is
            small.
    """
    if kind == "neumann":
        Q = skew(q, b)
        square = Q @ Q
        return 2.0 * (Q + square + square @ Q) + square @ square
    if b == 2:
        return _two(q)
    if b == 3:
        return _three(q)
    if b == 4:
        return _four(q)
    Q = skew(q, b)
    eye = torch.eye(b, dtype=q.dtype, device=q.device)
    # I - Q is never singular, so nothing has to be checked and no device waited for.
    # torch.linalg.solve isn't used, since its forward-mode derivative is a constant for a second
    # derivative
    return (2.0 * Q) @ torch.linalg.inv_ex(eye - Q)[0]


def _two(q: Tensor) -> Tensor:
    """b = 2: [[-q^2, q], [-q, -q^2]] 2 / (1 + q^2)."""
    diagonal = -q * q
    rows = torch.stack([diagonal, q, -q, diagonal], dim=-1)  # (..., 1, 4)
    return (rows * (2.0 / (1.0 + q * q)).unsqueeze(-1)).unflatten(-1, (2, 2)).squeeze(-3)


def _three(q: Tensor) -> Tensor:
    """b = 3: 2 (Q + Q^2) / (1 + |q|^2), since Q^3 = -|q|^2 Q."""
    Q = skew(q, 3)
    return (Q + Q @ Q) * (2.0 / (1.0 + q.square().sum(-1)))[..., None, None]


def _four(q: Tensor) -> Tensor:
    """b = 4: 2 (I + Q) (Q + f D) / (1 + |q|^2 + f^2), f the Pfaffian, D the dual of Q (Q D = -f I).

    Cayley-Hamilton gives Q^3 = f D - |q|^2 Q, and I - Q has the determinant 1 + |q|^2 + f^2.
    """
    q12, q13, q14, q23, q24, q34 = q.unbind(-1)
    dual = torch.stack([q34, -q24, q23, q14, -q13, q12], dim=-1)
    f = (q * dual).sum(-1, keepdim=True) / 2.0  # (..., 1)
    Q, odd = skew(torch.stack([q, q + f * dual]), 4).unbind(0)
    inverse = 2.0 / (1.0 + (q * q).sum(-1, keepdim=True) + f * f)
    return (odd + Q @ odd) * inverse.unsqueeze(-1)
