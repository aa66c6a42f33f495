"""RandLoRA: a sum of frozen random low-rank maps, whose diagonal scalings alone are learned.

    W' = W + s sum_j B_j diag(lam_j) A diag(gam_j)        s = alpha / r
    j = 1 ... N = ceil(m / r),   m = min(d_in, d_out),   M = max(d_in, d_out)
    A (r, m), B (M, N, r) frozen;   lam lora_lambda (r, N), gam lora_gamma (N, m)
    transposed where d_out < d_in

Together the maps have full rank. Paper: Albert et al. 2025, arXiv 2502.00987. Equal shapes have
equal random maps, drawn from `projection_seed` and the shape alone. The sum is one product of inner
size N r: for square layers twice the layer's own cost. (PEFT pairs the columns of B with the rows
of A in another order: the same method with its random columns permuted.)
Identity at the start: lam = 0. Needs only x and y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import random
from ..core.config import AdapterConfig, probability, record
from ..core.method import MATRICES, ParamSpec, Variant
from ..core.site import Params, Site
from ..core.update_functions import Forms, Work
from ._made_pair import Pair, in_dtype, made_pair


@dataclass(frozen=True, kw_only=True)
class RandLoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        r: rank of each random map; a smaller one means more maps and more parameters.
        alpha: strength; large, since the update's parts are random and small.
        projection_seed: of the frozen maps.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    r: int = 32
    alpha: float = 640.0
    projection_seed: int = record(0)
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "RandLoRAConfig.dropout")


def param_specs(cfg: RandLoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_lambda (r, N), lora_gamma (N, m); frozen lora_rand_A (r, m), lora_rand_B (M,
    N, r). An r above m makes one map.
    """
    small, large = sorted((site.d_in, site.d_out))
    n = -(-small // site.r)
    return {
        "lora_lambda": ParamSpec((site.r, n)),
        "lora_gamma": ParamSpec(
            (n, small), lambda shape, gen: torch.full(tuple(shape), 1.0 / max(shape))
        ),
        "lora_rand_A": ParamSpec((site.r, small), trainable=False),
        "lora_rand_B": ParamSpec((large, n, site.r), trainable=False),
    }


@random.kept
def _random(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Uniform, of standard deviation 1. One tensor per (seed, name, shape)."""
    drawn = random.uniform(1.0)(shape, random.generator(seed, f"{shape}", name))
    if drawn.numel() == 1:  # one number has no deviation: divide by that of the distribution
        return drawn * math.sqrt(3.0)
    return drawn / drawn.std()


def init(
    cfg: RandLoRAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The frozen maps, which the site's path has no part in."""
    return {
        name: _random(cfg.projection_seed, name, specs[name].shape)
        for name in ("lora_rand_A", "lora_rand_B")
    }


def _factors(cfg: RandLoRAConfig, p: Params, site: Site, dtype: torch.dtype | None) -> Pair:
    """The sum as one factor pair, (N r, d_in) and (d_out, N r)."""
    p = in_dtype(p, dtype)
    lam, gam = p["lora_lambda"].mT.unsqueeze(2), p["lora_gamma"].unsqueeze(1)
    scaled = lam * p["lora_rand_A"] * gam  # (N, r, m)
    A, B = scaled.flatten(0, 1), p["lora_rand_B"].flatten(1)  # (N r, m), (M, N r)
    return (A, B) if site.d_in <= site.d_out else (B.mT, A.mT)


_PHASES = made_pair(_factors)


def dense(cfg: RandLoRAConfig, site: Site, tokens: int) -> Forms:
    """The branch, or W + the sum built."""
    rank = -(-min(site.d_in, site.d_out) // site.r) * site.r
    return Forms(Work(rank * (site.d_in + site.d_out)), Work(rank * site.d_in * site.d_out))


def scale(cfg: RandLoRAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """lam times c."""
    return {**p, "lora_lambda": p["lora_lambda"] * c}


VARIANT = Variant(
    name="randlora",
    good_for="full rank from random bases",
    config=RandLoRAConfig,
    paper="Albert et al. 2025, arXiv 2502.00987",
    param_specs=param_specs,
    init=init,
    prepare=_PHASES.prepare,
    outputs=_PHASES.outputs,
    weight=_PHASES.weight,
    additive=True,
    dense=dense,
    scale=scale,
    sites=(*MATRICES, "embedding"),
)
