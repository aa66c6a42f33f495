"""Starts from what a layer saw: directions of its inputs, and its weight as they weigh it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.site import Site
from ..core.statistics import SiteStatistics

__all__ = ["check_tokens", "projected", "wide"]


def wide(t: Tensor) -> Tensor:
    """t in float64, where decompositions and small eigenvalues are safe; on the CPU if its device
    has no float64.
    """
    return t.to("cpu" if t.device.type == "mps" else t.device, torch.float64)


def check_tokens(seen: SiteStatistics, least: int, method: str) -> None:
    """Refuse statistics of fewer tokens than there are directions to find, or of inputs that are
    all zero.

    Raises:
        ConfigError: with how many there are.
    """
    if seen.count < least:
        raise ConfigError(
            f"{method} finds {least} directions in the inputs, expected at least as many tokens, "
            f"found {seen.count}"
        )
    if not bool(seen.magnitude.any()):
        raise ConfigError(f"{method}: every input of the calibration data is zero here")


def projected(W: Tensor, WM: Tensor, chosen: slice, site: Site) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) with s B A = U_r U_r^T W, sized by the singular values.

    For W M = U S V^T with any invertible M it is S V^T M^-1 = U^T W: the factors U sqrt(S / s) and
    sqrt(S / s) V^T M^-1 come without M's inverse. A direction whose singular value is rounding
    alone gets A = 0.

    Args:
        W: (d_out, d_in).
        WM: W M, (d_out, d_in).
        chosen: which r of the singular values, which descend.
        site: for s, its scaling.
    """
    U, S, _ = torch.linalg.svd(WM, full_matrices=False)  # (d_out, k), (k,)
    least = S[0] * max(W.shape) * torch.finfo(S.dtype).eps
    U, S = U[:, chosen], S[chosen]
    root = (S / site.scaling).sqrt()  # (r,)
    inverse = torch.where(least < S, 1.0 / (root * site.scaling), 0.0)
    return inverse[:, None] * (U.mT @ W), U * root
