"""IA3: one learned gate per output feature; IA3-FF: one per input feature.

    ia3:     y' = g * y           g (d_out,);  also scales the bias
    ia3_ff:  y' = W (g * x) + b   g (d_in,)

Paper: Liu et al. 2022, arXiv 2205.05638 (gates on keys and values, and on the input of the second
feed-forward layer).
Identity at the start: g = 1. Needs only x and y. r and alpha have no part in this method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.method import MATRICES, ParamSpec, Variant
from ..core.site import Params, Site


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """Shared fields (see AdapterConfig; r and alpha have no part in this method)."""


@dataclass(frozen=True, kw_only=True)
class IA3FFConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r and alpha have no part in this method)."""


def _gate(x: Tensor, g: Tensor) -> Tensor:
    return (x * g).to(x.dtype)  # the product in float32 at least


def output_specs(cfg: IA3Config, site: Site) -> dict[str, ParamSpec]:
    """lora_g (d_out,)."""
    return {"lora_g": ParamSpec((site.d_out,), "ones", dtype=torch.float32)}


def input_specs(cfg: IA3FFConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_g (d_in,)."""
    return {"lora_g": ParamSpec((site.d_in,), "ones", dtype=torch.float32)}


def outputs(cfg: IA3Config, p: Params, d: None, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """g * y."""
    return _gate(y, p["lora_g"])


def inputs(cfg: IA3FFConfig, p: Params, d: None, x: Tensor, site: Site) -> Tensor:
    """g * x."""
    return _gate(x, p["lora_g"])


def output_weight(
    cfg: IA3Config, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """diag(g) W, g * b."""
    g = p["lora_g"].to(W.dtype)
    return g[:, None] * W, None if b is None else g * b


def input_weight(
    cfg: IA3FFConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W diag(g), b."""
    return W * p["lora_g"].to(W.dtype), b


def scale(cfg: AdapterConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """The gate moved along its line from 1."""
    return {"lora_g": 1.0 + c * (p["lora_g"] - 1.0)}


_PAPER = "Liu et al. 2022, arXiv 2205.05638"

VARIANT = Variant(
    name="ia3",
    good_for="very few numbers: gates of outputs",
    config=IA3Config,
    paper=_PAPER,
    param_specs=output_specs,
    outputs=outputs,
    weight=output_weight,
    scale=scale,
    sites=(*MATRICES, "embedding", "norm", "vector"),
)
VARIANT_FF = Variant(
    name="ia3_ff",
    good_for="IA3's gates before feed-forward layers",
    config=IA3FFConfig,
    paper=_PAPER,
    param_specs=input_specs,
    inputs=inputs,
    weight=input_weight,
    scale=scale,
)
