"""PVeRA: VeRA with a learned variance beside its mean, drawn from in training.

    y' = y + b * ( (m + n * exp(l / 2)) B^T ),   (m, l) = the halves of (x A^T) * d
    A (2r, d_in), B (d_out, r) frozen;   d (2r,), b (d_out,)
    n ~ N(0, 1) for each token and direction in training mode, with sample=True; elsewhere 0

Paper: Fillioux et al. 2025, arXiv 2512.07703. The factors are drawn as VeRA's are. A merged weight
is the mean. With d small l is near 0, so the noise starts with a standard deviation of 1 beside a
small m, and reaches the output as b grows. It is torch's own, so `torch.manual_seed` fixes it.
Identity at the start: b = 0. Needs only x and y. alpha has no part in this method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import random
from ..core.config import AdapterConfig, probability, record
from ..core.errors import ConfigError
from ..core.method import Layer, ParamSpec, Variant
from ..core.site import Params, Site
from ..core.update_functions import Factors
from ..kernels import low_rank


@dataclass(frozen=True, kw_only=True)
class PVeRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part in this method), and:

    Args:
        r: number of random directions, larger than elsewhere: they cost two parameters each.
        d_initial: what d starts at.
        projection_seed: of the frozen factors.
        sample: whether n is drawn in training mode, as in the paper. Off it is the mean, and a call
            is a function of its arguments, as without dropout.
        sample_at_inference: whether n is drawn in evaluation mode too. A merged weight stays the
            mean.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    r: int = 256
    d_initial: float = record(0.1)
    projection_seed: int = record(0)
    sample: bool = False
    sample_at_inference: bool = False
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "PVeRAConfig.dropout")
        if self.sample_at_inference and not self.sample:
            raise ConfigError(
                "PVeRAConfig.sample_at_inference: nothing is drawn with sample=False; set both"
            )


def param_specs(cfg: PVeRAConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_d (2r,), lora_b (d_out,); frozen lora_A (2r, d_in), lora_B (d_out, r)."""
    return {
        "lora_d": ParamSpec(
            (2 * site.r,),
            lambda shape, gen: torch.full(tuple(shape), cfg.d_initial),
            dtype=torch.float32,
        ),
        "lora_b": ParamSpec((site.d_out,), dtype=torch.float32),
        "lora_A": ParamSpec((2 * site.r, site.d_in), trainable=False),
        "lora_B": ParamSpec((site.d_out, site.r), trainable=False),
    }


@random.kept
def _random(seed: int, name: str, shape: tuple[int, int]) -> Tensor:
    """Kaiming-uniform of gain sqrt(2), within +-sqrt(6 / columns); one per (seed, name, shape)."""
    draw = random.uniform(math.sqrt(6.0 / shape[1]))
    return draw(shape, random.generator(seed, f"{shape}", name))


def init(
    cfg: PVeRAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The frozen factors, which the site's path has no part in."""
    shapes = {"lora_A": (2 * site.r, site.d_in), "lora_B": (site.d_out, site.r)}
    return {name: _random(cfg.projection_seed, name, shape) for name, shape in shapes.items()}


def prepare(cfg: PVeRAConfig, p: Params, site: Site, layer: Layer) -> bool:
    """Whether to draw."""
    return cfg.sample and (layer.training or cfg.sample_at_inference)


def outputs(cfg: PVeRAConfig, p: Params, d: bool, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + b * ((m + n exp(l / 2)) B^T); where nothing is drawn the rows of A that make l are
    left out.
    """
    A, gate = (p["lora_A"], p["lora_d"]) if d else _mean(p)
    h = low_rank.project(x, A) * gate  # (..., 2r), or (..., r)
    if d:
        mean, log_variance = h.chunk(2, dim=-1)
        h = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    branch = F.linear(low_rank.cast(h, p["lora_B"].dtype), p["lora_B"])  # (..., d_out)
    return torch.addcmul(y, branch, p["lora_b"]).to(y.dtype)


def _mean(p: Params) -> tuple[Tensor, Tensor]:
    """The rows of A and entries of d that make m."""
    r = p["lora_B"].shape[-1]
    return p["lora_A"][:r], p["lora_d"][:r]


def weight(
    cfg: PVeRAConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + diag(b) B diag(d) A, of the halves that make m."""
    A, B, _ = low_rank_factors(cfg, {name: t.to(W.dtype) for name, t in p.items()}, site)
    return low_rank.add_dense(W, A, B), b


def scale(cfg: PVeRAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """b times c."""
    return {**p, "lora_b": p["lora_b"] * c}


def low_rank_factors(cfg: PVeRAConfig, p: Params, site: Site) -> Factors:
    """diag(d) A and diag(b) B, of the halves that make m."""
    A, d = _mean(p)
    return (d[:, None] * A).to(A.dtype), (p["lora_b"][:, None] * p["lora_B"]).to(A.dtype), 1.0


VARIANT = Variant(
    name="pvera",
    good_for="VeRA that learns its own spread",
    config=PVeRAConfig,
    paper="Fillioux et al. 2025, arXiv 2512.07703",
    param_specs=param_specs,
    init=init,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    additive=True,
    scale=scale,
    low_rank_factors=low_rank_factors,
    phases_in_training=lambda cfg: cfg.sample,
    phases_always=lambda cfg: cfg.sample_at_inference,
    sites=("linear",),
)
