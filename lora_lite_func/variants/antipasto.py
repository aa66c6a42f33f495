"""AntiPaSTO: the top singular values are shifted, their vectors rotated in small blocks.

    W' = W + U [ (S + d) R - S ] V^T
    U (d_out, r), S (r,), V^T lora_Vh (r, d_in) frozen;  d (r,), R of blocks (b, b)
    R_i = (I - X)^-1 (I + X),  X = A / 2,  A skew
    y' = y + [ M (x V) ] U^T,   M = (S + d)(R - I) + d
    basis "U":  W' = W + U [ R^T (S + d) - S ] V^T,   M = (R - I)^T (S + d) + d
    basis "none":  R = I
    lora_rot holds the entries of A above its diagonal, or twice them (`half_angles`)

Paper: Clark 2026, arXiv 2601.07473. It is made for steering both ways: a strength c of `ll.scale`
enters as S + c d and c A, so R(-c) is the inverse of R(c).
`max_angle` bounds A entry by entry: A <- a tanh(A / a), a = 2 tan(max_angle / 2). It is the largest
angle for blocks of two; larger blocks turn further (twice as far for four). c is applied before the
bound, so no strength exceeds it.
Identity at the start: d = 0 and A = 0, exactly. Needs W once, for the decomposition. alpha has no
part in this method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.config import AdapterConfig, added, probability, record
from ..core.errors import ConfigError
from ..core.method import MATRICES, Layer, ParamSpec, Variant
from ..core.site import Params, Site
from ..core.statistics import SiteStatistics
from ..core.update_functions import Forms, Work
from ..kernels import block_diagonal, cayley, low_rank
from . import _calibrated


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part in this method), and:

    Args:
        r: how many singular directions, a multiple of block_size.
        block_size: singular directions that are rotated among each other.
        basis: which singular vectors are rotated: those of the input ("V"), of the output ("U"), or
            "none".
        max_angle: bound on the angle, in radians below pi; None for no bound.
        half_angles: halve lora_rot before use, as lora-lite does (A = (T - T^T) / 2 of its
            triangle T): an optimizer's state that belongs to its angles goes on with these.
        select: which directions: "top" takes the largest singular values, "spread" those whose part
            of the output varies most on the calibration data, by S_i std(v_i x), "active" those
            whose part is largest there, by S_i mean|v_i x| (Wanda's rule, Sun et al. 2023, arXiv
            2306.11695; lora-lite's choice).
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    r: int = 256
    block_size: int = 4
    basis: Literal["V", "U", "none"] = "V"
    max_angle: float | None = None
    half_angles: bool = added(False)
    select: Literal["top", "spread", "active"] = record("top")
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "AntiPaSTOConfig.dropout")
        if self.block_size < 2:
            raise ConfigError(
                f"AntiPaSTOConfig.block_size: a rotation needs two directions, expected at least "
                f"2, found {self.block_size}"
            )
        for r in (self.r, *(r for _, r in self.rank_pattern)):
            if r % self.block_size and self.basis != "none":
                raise ConfigError(
                    f"AntiPaSTOConfig.r: expected a multiple of block_size={self.block_size}, "
                    f"found {r}"
                )
        if self.max_angle is not None and not 0.0 < self.max_angle < math.pi:
            raise ConfigError(
                f"AntiPaSTOConfig.max_angle: expected None or an angle between 0 and pi, found "
                f"{self.max_angle}"
            )


def param_specs(cfg: AntiPaSTOConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_delta_s (r,), lora_rot (r / b, b (b - 1) / 2) unless basis is "none"; frozen
    lora_U, lora_S, lora_Vh.

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "AntiPaSTO")
    specs = {
        "lora_delta_s": ParamSpec((site.r,), dtype=torch.float32),
        "lora_U": ParamSpec((site.d_out, site.r), trainable=False),
        "lora_S": ParamSpec((site.r,), trainable=False, dtype=torch.float32),
        "lora_Vh": ParamSpec((site.r, site.d_in), trainable=False),
    }
    if cfg.basis != "none":
        specs["lora_rot"] = ParamSpec(
            (site.r // cfg.block_size, cayley.pairs(cfg.block_size)), dtype=torch.float32
        )
    return specs


def init(
    cfg: AntiPaSTOConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: SiteStatistics | None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The chosen r singular triplets, in order of their singular values.

    Raises:
        ConfigError: fewer tokens than directions, or inputs that are all zero.
    """
    if cfg.select == "top":
        U, S, Vh = low_rank.top_svd(weight, site.r, None, generator("lora_U"))
        return {"lora_U": U, "lora_S": S, "lora_Vh": Vh}
    assert stats is not None  # `needs_by` says so
    _calibrated.check_tokens(stats, 2, "AntiPaSTO")
    U, S, Vh = torch.linalg.svd(_calibrated.wide(weight), full_matrices=False)
    if cfg.select == "active":
        size = _calibrated.wide(stats.activity).to(S.device)  # (k,) mean of |v_i x|
    else:
        second, mean = (_calibrated.wide(t).to(Vh.device) for t in (stats.second, stats.mean))
        spread = ((Vh @ second) * Vh).sum(1) - (Vh @ mean).square()  # (k,) variance of v_i x
        size = spread.clamp_min(0.0).sqrt()
    kept = (S * size).topk(site.r).indices.sort().values
    return {"lora_U": U[:, kept], "lora_S": S[kept], "lora_Vh": Vh[kept]}


def directions(cfg: AntiPaSTOConfig, site: Site, weight: Tensor) -> Tensor:
    """All right singular vectors of W (k, d_in), for the choice by their activity."""
    return torch.linalg.svd(_calibrated.wide(weight), full_matrices=False).Vh


def _core(cfg: AntiPaSTOConfig, p: Params, dtype: torch.dtype) -> Tensor:
    """M (r / b, b, b), or its diagonal (r,) where nothing is rotated."""
    S, shift = p["lora_S"].to(dtype), p["lora_delta_s"].to(dtype)
    if cfg.basis == "none":
        return shift
    A, b = p["lora_rot"].to(dtype), cfg.block_size
    if cfg.half_angles:
        A = A / 2.0
    if cfg.max_angle is not None:
        a = 2.0 * math.tan(cfg.max_angle / 2.0)
        A = a * torch.tanh(A / a)
    E = cayley.minus_identity(A / 2.0, b)
    value = (S + shift).unflatten(0, (-1, b))  # (r / b, b)
    turned = value.unsqueeze(-1) * E if cfg.basis == "V" else E.mT * value.unsqueeze(-2)
    return turned + torch.diag_embed(shift.unflatten(0, (-1, b)))


def _through(h: Tensor, core: Tensor) -> Tensor:
    """M h for every row of h (..., r)."""
    return h * core if core.ndim == 1 else block_diagonal.product(h, core.mT)


def prepare(cfg: AntiPaSTOConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """M, the map between V and U."""
    return _core(cfg, p, p["lora_S"].dtype)


def outputs(cfg: AntiPaSTOConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + [ M (x V) ] U^T."""
    Vh = p["lora_Vh"]
    h = low_rank.project(x, Vh)  # (..., r)
    return low_rank.expand(y, _through(h.to(d.dtype), d), p["lora_U"])


def weight(
    cfg: AntiPaSTOConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + U M V^T."""
    core = _core(cfg, p, W.dtype)
    return low_rank.add_dense(W, _through(p["lora_Vh"].to(W.dtype).mT, core).mT, p["lora_U"]), b


def dense(cfg: AntiPaSTOConfig, site: Site, tokens: int) -> Forms:
    """The branch, or the update built."""
    size = site.d_in * site.d_out
    return Forms(Work(site.r * (site.d_in + site.d_out)), Work(site.r * size, passes=size))


def scale(cfg: AntiPaSTOConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """d and A times c."""
    return {name: t * c if name in ("lora_delta_s", "lora_rot") else t for name, t in p.items()}


_NEEDS = {
    "top": {"weight"},
    "spread": {"weight", "inputs"},
    "active": {"weight", "inputs", "activity"},
}

VARIANT = Variant(
    name="antipasto",
    good_for="steering trained on pairs, both ways",
    config=AntiPaSTOConfig,
    paper="Clark 2026, arXiv 2601.07473",
    param_specs=param_specs,
    init=init,
    prepare=prepare,
    outputs=outputs,
    adds=True,
    weight=weight,
    dense=dense,
    scale=scale,
    directions=directions,
    needs=frozenset({"weight", "inputs", "activity"}),
    needs_by=lambda cfg: frozenset(_NEEDS[cfg.select]),
    sites=(*MATRICES, "embedding"),
)
