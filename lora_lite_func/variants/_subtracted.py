"""Methods that start at non-zero factors and subtract their frozen start: y' = y + s (B A - B0 A0) x. They differ in the start alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import ConfigError
from ..core.method import Layer, ParamSpec
from ..core.site import Params, Site
from ..kernels import low_rank

__all__ = [
    "check_alpha",
    "low_rank_factors",
    "outputs",
    "param_specs",
    "prepare",
    "scale",
    "weight",
]


def check_alpha(cfg: AdapterConfig) -> None:
    """Refuse a strength that a start of singular values can't be divided by.

    Raises:
        ConfigError: alpha isn't positive somewhere.
    """
    if cfg.alpha <= 0 or any(a <= 0 for _, a in cfg.alpha_pattern):
        raise ConfigError(
            f"{type(cfg).__name__}.alpha: the start divides by it, expected a positive number"
        )


def param_specs(site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_A (r, d_in), lora_B (d_out, r), and their frozen starts."""
    a, b = (site.r, site.d_in), (site.d_out, site.r)
    return {
        "lora_A": ParamSpec(a, rank_axis=0),
        "lora_B": ParamSpec(b, rank_axis=1),
        "lora_A0": ParamSpec(a, trainable=False, rank_axis=0),
        "lora_B0": ParamSpec(b, trainable=False, rank_axis=1),
    }


def prepare(cfg: AdapterConfig, p: Params, site: Site, layer: Layer) -> tuple[Tensor, Tensor]:
    """The update as one factor pair of rank 2r."""
    return low_rank.difference(
        p["lora_A"], p["lora_B"], p["lora_A0"], p["lora_B0"]
    )  # (2r, d_in), (d_out, 2r)


def outputs(
    cfg: AdapterConfig, p: Params, d: tuple[Tensor, Tensor], x: Tensor, y: Tensor, site: Site
) -> Tensor:
    """y + s (B A - B0 A0) x."""
    return low_rank.add(y, x, *d, site.scale)


def weight(
    cfg: AdapterConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + s (B A - B0 A0)."""
    A, B = low_rank.difference(
        *(p[n].to(W.dtype) for n in ("lora_A", "lora_B", "lora_A0", "lora_B0"))
    )
    return low_rank.add_dense(W, A, B, site.scale), b


def scale(cfg: AdapterConfig, p: Params, c: Any) -> dict[str, Tensor]:
    """Both terms times c."""
    return {**p, "lora_B": p["lora_B"] * c, "lora_B0": p["lora_B0"] * c}


def low_rank_factors(
    cfg: AdapterConfig, p: Params, site: Site
) -> tuple[Tensor, Tensor, float | Tensor]:
    """The update as one factor pair of rank 2r, and alpha / r."""
    return (*low_rank.difference(p["lora_A"], p["lora_B"], p["lora_A0"], p["lora_B0"]), site.scale)
