"""HiRA: the weight is multiplied, entry by entry, by one plus a low-rank matrix.

    W' = W + s W * (B A)      A (r, d_in), B (d_out, r), s = alpha / r

So r doesn't bound the update's rank. Paper: Huang et al. 2025, HiRA: Parameter-Efficient Hadamard
High-Rank Adaptation for Large Language Models, ICLR 2025 (there s = 1).
Identity at the start: B = 0. Multiplies the dense weight in every call: not for quantised layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.method import MATRICES, Layer, ParamSpec, Variant
from ..core.random import kaiming
from ..core.site import Params, Site
from ..kernels import low_rank
from ._pair import scale


@dataclass(frozen=True, kw_only=True)
class HiRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "HiRAConfig.dropout")


def param_specs(cfg: HiRAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (r, d_in), lora_B (d_out, r)."""
    return {
        "lora_A": ParamSpec((site.r, site.d_in), kaiming, rank_axis=0),
        "lora_B": ParamSpec((site.d_out, site.r), rank_axis=1),
    }


def _product(p: Params, dtype: torch.dtype, s: float | Tensor) -> Tensor:
    """s B A, (d_out, d_in)."""
    return p["lora_B"].to(dtype) @ (p["lora_A"] * s).to(dtype)


def _update(p: Params, W: Tensor, s: float | Tensor) -> Tensor:
    """s W * (B A), (d_out, d_in)."""
    return W * _product(p, W.dtype, s)


def prepare(cfg: HiRAConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """The dense update."""
    W = layer.weight
    return _update(p, W.to(torch.promote_types(W.dtype, p["lora_A"].dtype)), site.scale)


def outputs(cfg: HiRAConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + x (s W * (B A))^T."""
    return (y + low_rank.project(x, d)).to(y.dtype)


def weight(
    cfg: HiRAConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + s W * (B A)."""
    return low_rank.plus_times(W, _product(p, W.dtype, site.scale), W), b


def dense(cfg: HiRAConfig, site: Site, tokens: int) -> bool:
    """Always: the phases take a dense product of their own."""
    return True


VARIANT = Variant(
    name="hira",
    good_for="high rank that gates the weight",
    config=HiRAConfig,
    paper="Huang et al. 2025, ICLR 2025 (HiRA)",
    param_specs=param_specs,
    prepare=prepare,
    outputs=outputs,
    adds=True,
    weight=weight,
    dense=dense,
    scale=scale,
    sites=(*MATRICES, "embedding"),
)
