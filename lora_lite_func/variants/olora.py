"""OLoRA: start from an orthonormal basis of the weight's first columns, which is subtracted.

    y' = y + s [ (x A^T)(B - B0)^T + (x (A - A0)^T) B0^T ]      s = alpha / r
    A, A0 (r, d_in); B, B0 (d_out, r)
    W = Q R (Householder, unpivoted):   B0 = Q[:, :r],   A0 = R[:r]

Paper: Büyükakyüz 2024, arXiv 2406.01775 (there W is rewritten; here it is left as it is).
Q_r R_r is the first r columns of W and a part of the others, so the start depends on the order of
the input channels.
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
class OLoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "OLoRAConfig.dropout")


def param_specs(cfg: OLoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_A, lora_B and their frozen starts.

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "OLoRA")
    return _subtracted.factor_specs(site)


def init(
    cfg: OLoRAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The first r columns of Q and rows of R."""
    Q, R = torch.linalg.qr(weight)  # (d_out, k), (k, d_in)
    A, B = R[: site.r], Q[:, : site.r]
    return _subtracted.started(A, B)


VARIANT = _subtracted.variant(
    name="olora",
    good_for="PiSSA's aim without singular values",
    config=OLoRAConfig,
    paper="Büyükakyüz 2024, arXiv 2406.01775",
    param_specs=param_specs,
    init=init,
    needs=frozenset({"weight"}),
    sites=(*MATRICES, "embedding"),
)
