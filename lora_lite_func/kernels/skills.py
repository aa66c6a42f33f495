"""Factors of a task, out of those of shared skills."""

from __future__ import annotations

import torch
from torch import Tensor

from .low_rank import alike

__all__ = ["mixed_skills"]


def mixed_skills(A: Tensor, B: Tensor, amounts: Tensor) -> tuple[Tensor, Tensor]:
    """One pair of factors A (..., r, d_in), B (..., d_out, r), split by split the mixture of the
    skills' pairs, by amounts that are made to sum to 1.

    Args:
        A: (..., P, Q, r, d_in / P) of Q skills in P splits.
        B: (..., P, Q, d_out / P, r).
        amounts: (..., P Q), at least 0.
    """
    A, B = alike(A, B)
    w = amounts.unflatten(-1, A.shape[-4:-2])  # (..., P, Q)
    w = (w / (w.sum(-1, keepdim=True) + 1e-12)).to(A.dtype)
    mixed_A = torch.einsum("...pq,...pqrd->...prd", w, A)
    mixed_B = torch.einsum("...pq,...pqdr->...pdr", w, B)
    return mixed_A.transpose(-3, -2).flatten(-2), mixed_B.flatten(-3, -2)
