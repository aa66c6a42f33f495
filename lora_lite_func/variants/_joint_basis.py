"""A basis that the weights of several layers share, and what each weight is in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._calibrated import wide

__all__ = ["basis", "inverted", "role", "strengths"]

_RIDGE = 1e-3  # against layers that are nearly alike
_NOTHING = 1e-6  # a direction that the weight maps to less than this part of the largest


def role(path: str) -> str:
    """What layers that share a basis have in common: the last two names of their paths, of which a
    number doesn't count.
    """
    *before, last = path.split(".")
    return last if not before or before[-1].isdigit() else f"{before[-1]}.{last}"


def basis(weights: Sequence[Tensor]) -> Tensor:
    """V (d_in, d_in) of weights (d_out, d_in): columns in which all are nearly orthogonal.

    Any basis would do. Where the weights have as many rows as columns together it is found in
    float32, by the operations by which PEFT finds its own.
    """
    if sum(len(W) for W in weights) < weights[0].shape[1]:
        whole = torch.cat([wide(W.to(weights[0].device)) for W in weights])
        return torch.linalg.svd(whole, full_matrices=True)[2].mT
    parts = [W.to(weights[0].device, torch.float32) for W in weights]
    Q, R = torch.linalg.qr(torch.cat(parts))
    eye = torch.eye(R.shape[0], dtype=R.dtype, device=R.device)
    total = torch.zeros_like(eye)
    for part in Q.split([len(W) for W in parts]):
        total += torch.linalg.inv(part.mT @ part + _RIDGE * eye)
    return R.mT @ torch.linalg.eigh(total / len(parts)).eigenvectors


def inverted(V: Tensor) -> Tensor:
    """V^-1 (d_in, d_in) in float64; not finite where V has none."""
    return torch.linalg.inv_ex(wide(V)).inverse


def strengths(weight: Tensor, inverse: Tensor) -> Tensor:
    """The norms (d_in,) of the columns of W V^-T, 0 where they are rounding alone.

    Args:
        weight: W (d_out, d_in).
        inverse: V^-1.
    """
    norms = (wide(weight) @ wide(inverse).to(weight.device).mT).norm(dim=0)
    return torch.where(norms > _NOTHING * norms.max(), norms, 0.0)
