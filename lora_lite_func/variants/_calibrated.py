"""Starts from what a layer saw: directions of its inputs, the weight as its inputs weigh it. Tensors in, tensors out."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..spec import Site

__all__ = ["Seen", "check_tokens", "projected", "wide"]


class Seen(Protocol):
    """The calibration statistics of a site, as a method's `init` gets them."""

    @property
    def count(self) -> int:
        """N, the tokens seen."""

    @property
    def mean(self) -> Tensor:
        """(d_in,) mean of x."""

    @property
    def magnitude(self) -> Tensor:
        """(d_in,) mean of |x|."""

    @property
    def second(self) -> Tensor:
        """(d_in, d_in) mean of x^T x."""

    @property
    def gradient(self) -> Tensor:
        """(d_out, d_in) mean gradient of the loss in the weight."""


def wide(t: Tensor) -> Tensor:
    """t in float64, where decompositions and small eigenvalues are safe; on the CPU if its device has no float64."""
    return t.to("cpu" if t.device.type == "mps" else t.device, torch.float64)


def check_tokens(seen: Seen, least: int, method: str) -> None:
    """Refuse statistics of fewer tokens than there are directions to find, or of inputs that are all zero.

    Raises:
        ConfigError: with how many there are.
    """
    if seen.count < least:
        raise ConfigError(f"{method} finds {least} directions in the inputs, expected at least as many tokens, found {seen.count}")
    if not bool(seen.magnitude.any()):
        raise ConfigError(f"{method}: every input of the calibration data is zero here")


def projected(W: Tensor, U: Tensor, S: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) with s B A = U U^T W, sized by the singular values.

    For W M = U S V^T with any invertible M it is S V^T M^-1 = U^T W: the factors U sqrt(S / s) and sqrt(S / s) V^T M^-1 come without M's
    inverse.

    Args:
        W: (d_out, d_in).
        U: (d_out, r), orthonormal columns.
        S: (r,), at least 0.
        site: for s, its factor.
    """
    root = (S / site.factor).clamp_min(torch.finfo(S.dtype).tiny).sqrt()  # (r,)
    return (U.mT @ W) / (root[:, None] * site.factor), U * root
