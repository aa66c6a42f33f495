"""LoRA-GA: start where the first step is W's best low-rank step; the start is subtracted.

    y' = y + s [ (x A^T)(B - B0)^T + (x (A - A0)^T) B0^T ]      s = alpha / r
    A, A0 (r, d_in); B, B0 (d_out, r)
    G = d loss / d W = U S V^T, its top 2r triplets split
    "ArB2r":   A0 = c V_{1..r}^T,   B0 = c U_{r+1..2r}
    "stable":  c = d_out^(1/4) / sqrt(gamma)
    "gd":      c = 1 / s
    "unit":    c = 1

Paper: Wang, Yu and Li 2024, arXiv 2407.05000 (there W is rewritten; here it is left as it is).
A gradient step moves B A along B0 B0^T G + G A0^T A0. Any such split makes that c^2 times the best
rank 2r part of G.
Identity at the start: A = A0 and B = B0, so both brackets are exactly zero in every dtype.
Needs the gradient of the weight, once; not W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability, record
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import ParamSpec
from ..core.site import Site
from ..core.statistics import SiteStatistics
from . import _calibrated, _subtracted


@dataclass(frozen=True, kw_only=True)
class LoRAGAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        direction: which of the top 2r triplets go where: "ArB2r" (A the first r, B the next),
            "A2rBr" (the other way round), "ArBr" (B the odd ones, A the even ones), "random" (a
            random half each).
        scale: "stable" (the paper's, outputs of like size whatever the width), "gd" (divided by s)
            or "unit".
        gamma: of "stable"; larger starts smaller.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = record("ArB2r")
    scale: Literal["stable", "gd", "unit"] = record("stable")
    gamma: float = record(16.0)
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "LoRAGAConfig.dropout")
        if self.gamma <= 0:
            raise ConfigError(f"LoRAGAConfig.gamma: expected a positive number, found {self.gamma}")
        if self.scale == "gd" and (self.alpha <= 0 or any(a <= 0 for _, a in self.alpha_pattern)):
            raise ConfigError("LoRAGAConfig.alpha: 'gd' divides by it, expected a positive number")


def param_specs(cfg: LoRAGAConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_A, lora_B and their frozen starts.

    Raises:
        UnsupportedError: 2r is above what the gradient's rank can be.
    """
    limit = min(site.d_in, site.d_out) // 2
    if site.r > limit:
        raise UnsupportedError(
            f"LoRA-GA splits 2r directions of a {site.d_out} x {site.d_in} gradient, expected a "
            f"rank of at most {limit}, found r={site.r}; "
            "lower r, or set it there with rank_pattern"
        )
    return _subtracted.factor_specs(site)


def init(
    cfg: LoRAGAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: SiteStatistics,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The gradient's top 2r singular vectors, half of them on each side.

    Raises:
        ConfigError: the gradient can't serve.
    """
    G = _calibrated.wide(stats.gradient)  # (d_out, d_in)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    least = S[0] * max(G.shape) * torch.finfo(stats.gradient.dtype).eps
    rank = int((least < S).sum())
    if rank < 2 * site.r:
        raise ConfigError(
            f"LoRA-GA takes 2r = {2 * site.r} directions of the gradient, found {rank}; give "
            f"more tokens, or lower r"
        )
    of_A, of_B = _split(cfg.direction, site.r, generator("lora_A0"))
    c = _size(cfg, site)
    A, B = c * Vh[of_A], c * U[:, of_B]  # (r, d_in), (d_out, r)
    return _subtracted.started(A, B)


def _size(cfg: LoRAGAConfig, site: Site) -> float:
    """c, by which both factors start."""
    if cfg.scale == "stable":
        return float(site.d_out**0.25 / cfg.gamma**0.5)
    return 1.0 / site.scaling if cfg.scale == "gd" else 1.0


def _split(direction: str, r: int, gen: torch.Generator) -> tuple[list[int], list[int]]:
    """Which triplets go to A and which to B: two disjoint halves of the first 2r."""
    order = list(range(2 * r))
    if direction == "random":
        order = torch.randperm(2 * r, generator=gen).tolist()
    if direction == "ArBr":
        return order[1::2], order[::2]
    return (order[r:], order[:r]) if direction == "A2rBr" else (order[:r], order[r:])


VARIANT = _subtracted.variant(
    name="lora_ga",
    good_for="first steps like full fine-tuning's",
    config=LoRAGAConfig,
    paper="Wang, Yu and Li 2024, arXiv 2407.05000",
    param_specs=param_specs,
    init=init,
    needs=frozenset({"gradients"}),
)
