"""ASVD: train the principal part of the weight as the data sees it; its start is subtracted.

    y' = y + s [ (x A^T)(B - B0)^T + (x (A - A0)^T) B0^T ]      s = alpha / r
    A, A0 (r, d_in); B, B0 (d_out, r)
    W M = U S V^T:   B0 = U_r sqrt(S_r / s),   A0 = sqrt(S_r / s) V_r^T M^-1
    "magnitude":  M = diag(mean |x_j|)^power + 1e-6 I
    "root":       M M^T = mean x^T x

Paper: Yuan et al. 2023, arXiv 2312.05821, which compresses W this way; to start an adapter from it
is this library's transfer. "root" is the rank r part of W with the least squared error of the
layer's output on the data (SVD-LLM: Wang et al. 2024).
Identity at the start: A = A0 and B = B0, so both brackets are exactly zero in every dtype.
Needs W and statistics of the inputs, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability, record
from ..core.errors import ConfigError
from ..core.method import ParamSpec
from ..core.site import Site
from ..core.statistics import SiteStatistics
from ..kernels import low_rank
from . import _calibrated, _subtracted


@dataclass(frozen=True, kw_only=True)
class ASVDConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        weighting: "magnitude" (ASVD: each input feature by its mean size) or "root" (the whole
            second moment: the least output error).
        power: of the mean size, for "magnitude"; 0 is PiSSA's start.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    weighting: Literal["magnitude", "root"] = record("magnitude")
    power: float = record(0.5)
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "ASVDConfig.dropout")
        if self.power < 0:
            raise ConfigError(f"ASVDConfig.power: expected at least 0, found {self.power}")
        _subtracted.check_alpha(self)


def param_specs(cfg: ASVDConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_A, lora_B and their frozen starts.

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "ASVD")
    return _subtracted.factor_specs(site)


def init(
    cfg: ASVDConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: SiteStatistics,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The top r singular triplets of W M.

    Raises:
        ConfigError: fewer tokens than directions, or inputs that are all zero.
    """
    _calibrated.check_tokens(stats, site.r, "ASVD")
    W = _calibrated.wide(weight)
    if cfg.weighting == "magnitude":
        WM = W * (_calibrated.wide(stats.magnitude) ** cfg.power + 1e-6)  # (d_out, d_in)
    else:
        values, Q = torch.linalg.eigh(_calibrated.wide(stats.second))
        # a root of the moment up to a rotation, which U and S don't see
        WM = (W @ Q) * values.clamp_min(0.0).sqrt()
    A, B = _calibrated.projected(W, WM, slice(site.r), site)
    return _subtracted.started(A, B)


VARIANT = _subtracted.variant(
    name="asvd",
    good_for="principal parts as the data weighs",
    config=ASVDConfig,
    paper="Yuan et al. 2023, arXiv 2312.05821",
    param_specs=param_specs,
    init=init,
    needs=frozenset({"weight", "inputs"}),
)
