"""Methods that start at non-zero factors and subtract that start: y' = y + s (B A - B0 A0) x.

They differ in the start alone: `variant` makes their record of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import ConfigError
from ..core.method import ParamSpec, Variant
from ..core.phase_functions import Map
from ..core.site import Params, Site
from ..core.start_functions import InitFn, ParamSpecsFn
from ..core.type_variables import ConfigT
from ..kernels import low_rank
from ._made_pair import Pair, in_dtype, made_pair

__all__ = ["check_alpha", "factor_specs", "started", "variant"]


def check_alpha(cfg: AdapterConfig) -> None:
    """Refuse a strength that a start of singular values can't be divided by.

    Raises:
        ConfigError: alpha isn't positive somewhere.
    """
    if cfg.alpha <= 0 or any(a <= 0 for _, a in cfg.alpha_pattern):
        raise ConfigError(
            f"{type(cfg).__name__}.alpha: the start divides by it, expected a positive number"
        )


def factor_specs(site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_A (r, d_in) and lora_B (d_out, r), and their frozen starts."""
    a, b = (site.r, site.d_in), (site.d_out, site.r)
    return {
        "lora_A": ParamSpec(a, rank_axis=0),
        "lora_B": ParamSpec(b, rank_axis=1),
        "lora_A0": ParamSpec(a, trainable=False, rank_axis=0),
        "lora_B0": ParamSpec(b, trainable=False, rank_axis=1),
    }


def started(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The tensors at their start, A (r, d_in) and B (d_out, r)."""
    return {"lora_A": A, "lora_B": B, "lora_A0": A, "lora_B0": B}


def _difference(cfg: AdapterConfig, p: Params, site: Site, dtype: torch.dtype | None) -> Pair:
    """B A - B0 A0 as one factor pair of rank 2r, (2r, d_in) and (d_out, 2r)."""
    p = in_dtype(p, dtype)
    return low_rank.difference(p["lora_A"], p["lora_B"], p["lora_A0"], p["lora_B0"])


_PHASES = made_pair(_difference)


def called_outputs(
    cfg: AdapterConfig,
    p: Params,
    d: Pair,
    x: Tensor,
    y: Tensor,
    site: Site,
    A: Map,
    B: Map,
) -> Tensor:
    """y + s (B(A(x)) - B0 A0 x), which is exactly y at the start: both terms are one product."""
    start = F.linear(F.linear(x, p["lora_A0"]), p["lora_B0"])  # (..., d_out)
    return (y + (B(A(x)) - start) * site.scale).to(y.dtype)


def scale(cfg: AdapterConfig, p: Params, c: float | Tensor) -> Mapping[str, Tensor]:
    """Both terms times c."""
    return {**p, "lora_B": p["lora_B"] * c, "lora_B0": p["lora_B0"] * c}


def variant(
    *,
    name: str,
    good_for: str,
    config: type[ConfigT],
    paper: str,
    param_specs: ParamSpecsFn[ConfigT],
    init: InitFn[ConfigT],
    needs: frozenset[str],
    sites: tuple[str, ...] = (),
) -> Variant[ConfigT, Pair]:
    """The record of a method that differs from the others in its start.

    Args:
        name: as files and tables call it.
        good_for: what it is good for, in a few words.
        config: its config class.
        paper: authors, year, arXiv id.
        param_specs: `factor_specs`, after the method's own checks.
        init: gives `started(A, B)`.
        needs: what `init` needs.
        sites: kinds of site; the default as in Variant.
    """
    return Variant(
        name=name,
        good_for=good_for,
        config=config,
        paper=paper,
        param_specs=param_specs,
        init=init,
        prepare=_PHASES.prepare,
        outputs=_PHASES.outputs,
        weight=_PHASES.weight,
        additive=True,
        scale=scale,
        low_rank_factors=_PHASES.low_rank_factors,
        called_outputs=called_outputs,
        batched=True,
        needs=needs,
        sites=sites,
    )
