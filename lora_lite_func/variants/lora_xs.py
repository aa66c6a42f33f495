"""LoRA-XS: an r x r matrix between frozen singular directions; TinyLoRA: a vector that mixes them.

    y' = y + s (x A^T) R^T B^T
    A (r, d_in), B (d_out, r) frozen, of W = U S V^T:
    LoRA-XS     A = V_r^T,           B = U_r S_r;           R (r, r),        s = alpha / r
    TinyLoRA    A = sqrt(S_r) V_r^T, B = U_r sqrt(S_r);     R = sum_i v_i P_i,   s = 1
                v (u,);  P (u, r, r) frozen, Gaussian of variance 1 / r

Papers: LoRA-XS, Bałazy et al. 2024, arXiv 2405.17604 (there R starts at a Gaussian of deviation
1e-5; here at 0, which has the same gradient and is exact; the released code has LoRA's scale).
TinyLoRA, Morris et al. 2026, arXiv 2602.04118, where layers in a row may share v: `tying`.
Identity at the start: R = 0, or v = 0. Needs W once, for the decomposition.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, added, by_path, probability, record
from ..core.errors import ConfigError
from ..core.method import MATRICES, ParamSpec, Variant
from ..core.random import normal
from ..core.site import Params, Site
from ..core.statistics import SiteStatistics
from ..core.torch_internals import first_of
from ..kernels import low_rank
from ._made_pair import Pair, in_dtype, made_pair


@dataclass(frozen=True, kw_only=True)
class LoRAXSConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        r: side of the trained matrix, larger than elsewhere: a layer has r^2 parameters.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
        svd_niter: None for the full SVD; a number for the randomised one with that many power
            iterations (4 to 16).
    """

    r: int = 64
    dropout: float = 0.0
    svd_niter: int | None = record(None)

    def validate(self) -> None:
        _check(self.dropout, self.svd_niter, "LoRAXSConfig")


@dataclass(frozen=True, kw_only=True)
class TinyLoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part in this method), and:

    Args:
        r: how many singular directions.
        u: how many parameters a layer has, or a group of layers that share them.
        tying: how much of the layers' independence is given up: 0 for a v of its own for each, 1
            for one v. There are max(1, round(n (1 - tying))) groups of equally many of the n layers
            in the order of the model; the last one has what is left over.
        tied: {path: number of its group}; init fills it in.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
        svd_niter: None for the full SVD; a number for the randomised one with that many power
            iterations (4 to 16).
    """

    r: int = 2
    u: int = 64
    dropout: float = 0.0
    svd_niter: int | None = record(None)
    tying: float = added(0.0)
    tied: tuple[tuple[str, int], ...] = by_path(())

    def validate(self) -> None:
        _check(self.dropout, self.svd_niter, "TinyLoRAConfig")
        if not 0.0 <= self.tying <= 1.0:
            raise ConfigError(
                f"TinyLoRAConfig.tying: expected a part in [0, 1], found {self.tying}"
            )
        if self.u < 1:
            raise ConfigError(f"TinyLoRAConfig.u: expected at least 1, found {self.u}")


def _check(dropout: float, svd_niter: int | None, where: str) -> None:
    probability(dropout, f"{where}.dropout")
    if svd_niter is not None and svd_niter < 0:
        raise ConfigError(f"{where}.svd_niter: expected None or at least 0, found {svd_niter}")


def _frozen(site: Site) -> dict[str, ParamSpec]:
    """The singular directions."""
    return {
        "lora_A": ParamSpec((site.r, site.d_in), trainable=False),
        "lora_B": ParamSpec((site.d_out, site.r), trainable=False),
    }


def param_specs(cfg: LoRAXSConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_R (r, r); frozen lora_A, lora_B.

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "LoRA-XS")
    return {"lora_R": ParamSpec((site.r, site.r)), **_frozen(site)}


def tiny_param_specs(cfg: TinyLoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_v (u,), which tied layers share; frozen lora_P (u, r, r), lora_A, lora_B.

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "TinyLoRA")
    draw = normal(1.0 / math.sqrt(site.r))
    number = first_of((n for path, n in cfg.tied if path == site.path), None)
    if cfg.tying == 1.0:
        number = 0
    group = None if number is None else f"tied.{number}"
    return {
        "lora_v": ParamSpec((cfg.u,), dtype=torch.float32, group=group),
        "lora_P": ParamSpec((cfg.u, site.r, site.r), draw, trainable=False),
        **_frozen(site),
    }


def plan(
    cfg: TinyLoRAConfig, sites: Sequence[Site], seen: Mapping[str, SiteStatistics]
) -> TinyLoRAConfig:
    """The config with the groups of layers that share v, where they aren't all or none."""
    numbers = tied_groups(len(sites), cfg.tying) if 0.0 < cfg.tying < 1.0 else []
    tied = tuple((site.path, number) for site, number in zip(sites, numbers, strict=False))
    return dataclasses.replace(cfg, tied=tied)


def tied_groups(count: int, tying: float) -> list[int]:
    """The number of the group of each of so many layers, in order."""
    groups = max(1, round(count * (1.0 - tying)))
    size = max(1, count // groups)
    return [min(i // size, groups - 1) for i in range(count)]


def init(
    cfg: LoRAXSConfig | TinyLoRAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The top r singular directions; TinyLoRA splits the values evenly between the sides."""
    U, S, Vh = low_rank.top_svd(weight, site.r, cfg.svd_niter, generator("lora_A"))
    if isinstance(cfg, LoRAXSConfig):
        return {"lora_A": Vh, "lora_B": U * S}
    root = S.sqrt()  # (r,)
    return {"lora_A": root[:, None] * Vh, "lora_B": U * root}


def _between(p: Params) -> Tensor:
    """R (r, r)."""
    if "lora_R" in p:
        return p["lora_R"]
    dtype = torch.promote_types(p["lora_v"].dtype, p["lora_P"].dtype)
    return torch.einsum("...u,...uij->...ij", p["lora_v"].to(dtype), p["lora_P"].to(dtype))


def _factors(cfg: AdapterConfig, p: Params, site: Site, dtype: torch.dtype | None) -> Pair:
    """B R A as one factor pair, (r, d_in) and (d_out, r)."""
    p = in_dtype(p, dtype)
    A = p["lora_A"]
    return low_rank.around_core(A, _between(p).to(A.dtype), p["lora_B"])


_PHASES = made_pair(_factors)


def scale(cfg: AdapterConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """R, or v, times c."""
    return {name: t * c if name in ("lora_R", "lora_v") else t for name, t in p.items()}


VARIANT = Variant(
    name="lora_xs",
    good_for="thousands of adapters, r squared numbers",
    config=LoRAXSConfig,
    paper="Bałazy et al. 2024, arXiv 2405.17604",
    param_specs=param_specs,
    init=init,
    prepare=_PHASES.prepare,
    outputs=_PHASES.outputs,
    weight=_PHASES.weight,
    additive=True,
    scale=scale,
    low_rank_factors=_PHASES.low_rank_factors,
    batched=True,
    needs=frozenset({"weight"}),
    sites=(*MATRICES, "embedding"),
)

VARIANT_TINY = Variant(
    name="tinylora",
    good_for="a handful of numbers, reinforcement learning",
    config=TinyLoRAConfig,
    paper="Morris et al. 2026, arXiv 2602.04118",
    param_specs=tiny_param_specs,
    plan=plan,
    init=init,
    prepare=_PHASES.prepare,
    outputs=_PHASES.outputs,
    weight=_PHASES.weight,
    additive=True,
    scale=scale,
    scaling=lambda cfg, site: 1.0,
    low_rank_factors=_PHASES.low_rank_factors,
    batched=True,
    needs=frozenset({"weight"}),
    sites=(*MATRICES, "embedding"),
)
