"""MiLoRA: train the minor singular directions of the weight; their start is subtracted.

    y' = y + s [ (x A^T)(B - B0)^T + (x (A - A0)^T) B0^T ]      s = alpha / r
    A, A0 (r, d_in); B, B0 (d_out, r)
    W = U S V^T, its r smallest values:   B0 = U_- sqrt(S_- / s),   A0 = sqrt(S_- / s) V_-^T

PiSSA from the other end: the principal directions stay as they are. Paper: Wang et al. 2024, arXiv
2406.09044 (there W is rewritten; here it is left as it is).
Identity at the start: A = A0 and B = B0, so both brackets are exactly zero in every dtype.
Needs W once, for the decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.method import MATRICES, ParamSpec
from ..core.site import Site
from ..kernels import low_rank
from . import _subtracted


@dataclass(frozen=True, kw_only=True)
class MiLoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "MiLoRAConfig.dropout")
        _subtracted.check_alpha(self)


def param_specs(cfg: MiLoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_A, lora_B and their frozen starts.

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "MiLoRA")
    return _subtracted.factor_specs(site)


def init(
    cfg: MiLoRAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The bottom r singular triplets, split evenly between the factors."""
    U, S, Vh = low_rank.bottom_svd(weight, site.r)
    root = (S / site.scaling).sqrt()  # (r,)
    return _subtracted.started(root[:, None] * Vh, U * root)


VARIANT = _subtracted.variant(
    name="milora",
    good_for="leaving what the base knows best",
    config=MiLoRAConfig,
    paper="Wang et al. 2024, arXiv 2406.09044",
    param_specs=param_specs,
    init=init,
    needs=frozenset({"weight"}),
    sites=(*MATRICES, "embedding"),
)
