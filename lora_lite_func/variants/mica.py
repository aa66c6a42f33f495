"""MiCA: LoRA whose B is frozen at the weight's minor output directions; A alone is learned.

    y' = y + s (x A^T) B^T        s = alpha / r
    A (r, d_in);   B (d_out, r) frozen, the last r left singular vectors of W

Paper: Minor Component Adaptation, arXiv 2604.01694.
Identity at the start: A = 0. Needs W once, for the decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.method import MATRICES, ParamSpec, Variant
from ..core.site import Params, Site
from ..kernels import low_rank
from . import _pair


@dataclass(frozen=True, kw_only=True)
class MiCAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "MiCAConfig.dropout")


def param_specs(cfg: MiCAConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_A (r, d_in); frozen lora_B (d_out, r).

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "MiCA")
    return {
        "lora_A": ParamSpec((site.r, site.d_in), rank_axis=0),
        "lora_B": ParamSpec((site.d_out, site.r), trainable=False, rank_axis=1),
    }


def init(
    cfg: MiCAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The directions that W writes least into."""
    return {"lora_B": low_rank.bottom_svd(weight, site.r)[0]}


def scale(cfg: MiCAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """A times c."""
    return {**p, "lora_A": p["lora_A"] * c}


VARIANT = Variant(
    name="mica",
    good_for="LoRA's half, which forgets less",
    config=MiCAConfig,
    paper="Minor Component Adaptation 2026, arXiv 2604.01694",
    param_specs=param_specs,
    init=init,
    outputs=_pair.outputs,
    weight=_pair.weight,
    additive=True,
    scale=scale,
    low_rank_factors=_pair.low_rank_factors,
    called_outputs=_pair.called_outputs,
    batched=True,
    needs=frozenset({"weight"}),
    sites=(*MATRICES, "embedding"),
)
