"""PiSSA: train the principal singular directions of the weight; their start is subtracted.

    y' = y + s [ (x A^T)(B - B0)^T + (x (A - A0)^T) B0^T ]      s = alpha / r
    A, A0 (r, d_in); B, B0 (d_out, r)
    W = U S V^T:   B0 = U_r sqrt(S_r / s),   A0 = sqrt(S_r / s) V_r^T

Paper: Meng, Wang and Zhang 2024, arXiv 2404.02948 (there s = 1 and W is rewritten; here W is left
as it is).
Identity at the start: A = A0 and B = B0, so both brackets are exactly zero in every dtype.
Needs W once, for the decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, iterations, probability, record
from ..core.method import MATRICES, ParamSpec
from ..core.site import Site
from ..kernels import low_rank
from . import _subtracted


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        dropout: probability of dropping an entry of the branch's input, in training mode only.
        svd_niter: None for the full SVD; a number for the randomised one with that many power
            iterations (4 to 16).
    """

    dropout: float = 0.0
    svd_niter: int | None = record(None)

    def validate(self) -> None:
        probability(self.dropout, "PiSSAConfig.dropout")
        iterations(self.svd_niter, "PiSSAConfig.svd_niter")
        _subtracted.check_alpha(self)


def param_specs(cfg: PiSSAConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_A, lora_B and their frozen starts.

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "PiSSA")
    return _subtracted.factor_specs(site)


def init(
    cfg: PiSSAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The top r singular triplets, split evenly between the factors."""
    U, S, Vh = low_rank.top_svd(weight, site.r, cfg.svd_niter, generator("lora_A0"))
    root = (S / site.scaling).sqrt()  # (r,)
    A, B = root[:, None] * Vh, U * root  # (r, d_in), (d_out, r)
    return _subtracted.started(A, B)


VARIANT = _subtracted.variant(
    name="pissa",
    good_for="faster first steps than LoRA's",
    config=PiSSAConfig,
    paper="Meng, Wang and Zhang 2024, arXiv 2404.02948",
    param_specs=param_specs,
    init=init,
    needs=frozenset({"weight"}),
    sites=(*MATRICES, "embedding"),
)
