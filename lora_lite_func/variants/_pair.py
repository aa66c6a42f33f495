"""Phases of methods whose update is the stored pair of factors: y' = y + s (x A^T) B^T.

They differ in how A and B start, and in which of them is trained.
"""

from __future__ import annotations

from torch import Tensor

from ..core.config import AdapterConfig
from ..core.param_spec import ParamSpec
from ..core.phase_functions import Map
from ..core.site import Params, Site
from ..core.update_functions import Factors
from ..kernels import low_rank

__all__ = ["called_outputs", "factor_specs", "low_rank_factors", "outputs", "scale", "weight"]


def factor_specs(site: Site) -> dict[str, ParamSpec]:
    """lora_A (r, d_in), lora_B (d_out, r), both of which a method's `init` makes."""
    return {
        "lora_A": ParamSpec((site.r, site.d_in), rank_axis=0),
        "lora_B": ParamSpec((site.d_out, site.r), rank_axis=1),
    }


def outputs(cfg: AdapterConfig, p: Params, d: None, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + s (x A^T) B^T."""
    return low_rank.add(y, x, p["lora_A"], p["lora_B"], site.scale)


def called_outputs(
    cfg: AdapterConfig, p: Params, d: None, x: Tensor, y: Tensor, site: Site, A: Map, B: Map
) -> Tensor:
    """y + s B(A(x))."""
    return low_rank.add_called(y, x, A, B, site.scale)


def weight(
    cfg: AdapterConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + s B A."""
    return low_rank.add_dense(W, p["lora_A"], p["lora_B"], site.scale), b


def low_rank_factors(cfg: AdapterConfig, p: Params, site: Site) -> Factors:
    """A, B and s."""
    return p["lora_A"], p["lora_B"], site.scale


def scale(cfg: AdapterConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """B times c, for any method whose update is linear in lora_B."""
    return {**p, "lora_B": p["lora_B"] * c}
