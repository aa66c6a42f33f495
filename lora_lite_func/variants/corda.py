"""CorDA: train singular directions of the covariance-weighted W; its start is subtracted.

    y' = y + s [ (x A^T)(B - B0)^T + (x (A - A0)^T) B0^T ]      s = alpha / r
    A, A0 (r, d_in); B, B0 (d_out, r)
    C = mean x^T x + damp mean(diag) I
    W C = U S V^T:   B0 = U_r sqrt(S_r / s),   A0 = sqrt(S_r / s) V_r^T C^-1

Paper: Yang et al. 2024, arXiv 2406.05223 (there W is rewritten; here it is left as it is).
"ipm" trains the top r directions, which adapts to what the data is about; "kpm" trains the bottom
r, which keeps that as it is.
Identity at the start: A = A0 and B = B0, so both brackets are exactly zero in every dtype.
Needs W and the second moment of the inputs, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability, record
from ..core.method import ParamSpec
from ..core.site import Site
from ..core.statistics import SiteStatistics
from ..kernels import low_rank
from . import _calibrated, _subtracted

_DAMP = 0.01
"""The official code's, which doubles it while C's inverse is bad; float64 never needs that."""


@dataclass(frozen=True, kw_only=True)
class CorDAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        mode: "ipm" (instruction-previewed: the top directions) or "kpm" (knowledge-preserved: the
            bottom ones).
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    mode: Literal["ipm", "kpm"] = record("ipm")
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "CorDAConfig.dropout")
        _subtracted.check_alpha(self)


def param_specs(cfg: CorDAConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_A, lora_B and their frozen starts.

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "CorDA")
    return _subtracted.factor_specs(site)


def init(
    cfg: CorDAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: SiteStatistics,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The top or bottom r singular triplets of W C.

    Raises:
        ConfigError: fewer tokens than directions, or inputs that are all zero.
    """
    _calibrated.check_tokens(stats, site.r, "CorDA")
    W, C = _calibrated.wide(weight), _calibrated.wide(stats.second)
    C = C + _DAMP * C.diagonal().mean() * torch.eye(site.d_in, dtype=C.dtype, device=C.device)
    chosen = slice(site.r) if cfg.mode == "ipm" else slice(-site.r, None)
    A, B = _calibrated.projected(W, W @ C, chosen, site)
    return _subtracted.started(A, B)


VARIANT = _subtracted.variant(
    name="corda",
    good_for="keeping knowledge, or learning one task",
    config=CorDAConfig,
    paper="Yang et al. 2024, arXiv 2406.05223",
    param_specs=param_specs,
    init=init,
    needs=frozenset({"weight", "inputs"}),
)
