"""Rotations from a few free numbers: skew matrices and their Cayley transform, minus the identity. Tensors in, tensors out.

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
    i = torch.arange(b, device=q.device)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    place = (low * (2 * b - low - 1) // 2 + high - low - 1).clamp_min(0)  # (b, b); the diagonal's is never used
    sign = torch.sign(i - i[:, None]).to(q.dtype)  # (b, b): 1 above, 0 on, -1 below the diagonal
    return q.index_select(-1, place.flatten()).unflatten(-1, (b, b)) * sign


def minus_identity(q: Tensor, b: int, kind: Kind = "exact") -> Tensor:
    """E = R - I, (..., b, b), of q (..., b (b - 1) / 2), in q's dtype (float32 at least, for precision).

    Args:
        q: strict upper triangles.
        b: size of a block.
        kind: "exact" (closed forms up to b = 4, one batched solve beyond), or "neumann", the series
            I + 2Q + 2Q^2 + 2Q^3 + Q^4 that OFTv2 uses: only nearly orthogonal, and only while Q is small.
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
    return torch.linalg.solve_ex(eye - Q, 2.0 * Q)[0]  # I - Q is never singular: no check, so no wait for the device


def _square(Q: Tensor) -> Tensor:
    """Q Q for tiny blocks, as sums: autocast leaves it alone, and a batched product has nothing to gain."""
    return (Q.unsqueeze(-1) * Q.unsqueeze(-3)).sum(-2)


def _two(q: Tensor) -> Tensor:
    """b = 2: [[-q^2, q], [-q, -q^2]] 2 / (1 + q^2)."""
    diagonal = -q * q
    rows = torch.stack([diagonal, q, -q, diagonal], dim=-1)  # (..., 1, 4)
    return (rows * (2.0 / (1.0 + q * q)).unsqueeze(-1)).unflatten(-1, (2, 2)).squeeze(-3)


def _three(q: Tensor) -> Tensor:
    """b = 3: 2 (Q + Q^2) / (1 + |q|^2), since Q^3 = -|q|^2 Q."""
    Q = skew(q, 3)
    return (Q + _square(Q)) * (2.0 / (1.0 + q.square().sum(-1)))[..., None, None]


def _four(q: Tensor) -> Tensor:
    """b = 4: 2 (Q + f D + Q^2 - f^2 I) / (1 + |q|^2 + f^2), f the Pfaffian, D the dual of Q (Q D = -f I).

    Cayley-Hamilton gives Q^3 = f D - |q|^2 Q, and I - Q has the determinant 1 + |q|^2 + f^2.
    """
    q12, q13, q14, q23, q24, q34 = q.unbind(-1)
    f = q12 * q34 - q13 * q24 + q14 * q23
    dual = torch.stack([q34, -q24, q23, q14, -q13, q12], dim=-1)
    Q = skew(q, 4)
    odd = skew(q + f.unsqueeze(-1) * dual, 4)
    eye = torch.eye(4, dtype=q.dtype, device=q.device)
    inverse = 2.0 / (1.0 + q.square().sum(-1) + f * f)
    return (odd + _square(Q) - (f * f)[..., None, None] * eye) * inverse[..., None, None]
