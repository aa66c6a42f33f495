"""BitFit: a trainable shift of the layer's output, which is a change of its bias.

    y' = y + b~       b~ lora_b (d_out,)

Paper: Ben Zaken, Goldberg and Ravfogel 2021, arXiv 2106.10199, which trains existing biases alone;
here a layer without one gets one on merging.
Identity at the start: b~ = 0. Needs only y. r and alpha have no part in this method.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.config import AdapterConfig
from ..core.method import ParamSpec, Variant
from ..core.site import Params, Site


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r and alpha have no part in this method)."""


def param_specs(cfg: BitFitConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_b (d_out,)."""
    return {"lora_b": ParamSpec((site.d_out,))}


def outputs(cfg: BitFitConfig, p: Params, d: None, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + b~."""
    return (y + p["lora_b"]).to(y.dtype)


def weight(
    cfg: BitFitConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W, b + b~."""
    shift = p["lora_b"].to(W.dtype)
    return W, shift if b is None else b + shift


def scale(cfg: BitFitConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """b~ times c."""
    return {"lora_b": p["lora_b"] * c}


VARIANT = Variant(
    name="bitfit",
    good_for="biases alone, beside other adapters",
    config=BitFitConfig,
    paper="Ben Zaken, Goldberg and Ravfogel 2021, arXiv 2106.10199",
    param_specs=param_specs,
    outputs=outputs,
    adds=True,
    weight=weight,
    scale=scale,
    sites=("linear", "conv", "embedding", "norm"),
)
