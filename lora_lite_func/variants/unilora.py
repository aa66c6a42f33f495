"""UniLoRA: every entry of every factor is taken from one short vector, which all layers share.

    y' = y + g s (B A - B0 A0) x
    A (r, d_in) = theta[I_A], B (d_out, r) = theta[I_B], A0 and B0 likewise of theta0, the start
    theta (d,) of all layers;   I_A (r, d_in), I_B (d_out, r) frozen random places in it;
    s = d / D, D the number of entries of all factors;   g = 1, a strength

Paper: Li et al. 2025, arXiv 2506.00799. There each entry is divided by the root of how often its
place occurs among all factors, so that theta -> factors keeps lengths. Here each tensor's places
are a shuffle in which all of theta occurs equally often, up to one, drawn of the seed, the path and
the name alone; and both roots are the constant sqrt(D / d), which makes s. The paper doesn't
subtract the start, and is off the base's outputs there.
Identity at the start: theta is theta0. Needs only x and y.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability, record
from ..core.errors import ConfigError
from ..core.method import ParamSpec, Variant
from ..core.random import Draw, uniform
from ..core.site import Params, Site
from ..core.statistics import SiteStatistics
from ..kernels import low_rank, positions
from ..kernels.indices import check_indices
from ._made_pair import Pair, made_pair

_GROUP = "all"


@dataclass(frozen=True, kw_only=True)
class UniLoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part in this method), and:

    Args:
        r: rank of the update.
        length: of the vector, d: all that is trained.
        exact_start: start at the base's very outputs, by subtracting the start. PEFT's files are of
            adapters without it.
        norms: each place of the vector has a number of its own at each layer that it is multiplied
            by, instead of s, as PEFT's files have them.
        total: D; init counts it.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    r: int = 4
    length: int = 256
    exact_start: bool = True
    norms: bool = False
    total: int = record(0)
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "UniLoRAConfig.dropout")
        if self.length < 1:
            raise ConfigError(f"UniLoRAConfig.length: expected at least 1, found {self.length}")
        if self.total < 0:
            raise ConfigError(f"UniLoRAConfig.total: expected at least 0, found {self.total}")


def _shuffled(length: int) -> Draw:
    """Numbers below `length`, all equally often up to one, in any order."""

    def draw(shape: Sequence[int], gen: torch.Generator) -> Tensor:
        count = torch.Size(shape).numel()
        first = torch.randint(length, (), generator=gen)  # where those that are one more begin
        places = torch.randperm(count, generator=gen) + first
        return (places % length).view(*shape)

    return draw


def param_specs(cfg: UniLoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_theta (d,) of all sites; frozen lora_idx_A (r, d_in), lora_idx_B (d_out, r),
    lora_gain (), lora_theta0 (d,) of all sites with `exact_start`, lora_norm (d,) with `norms`.
    """
    d, wide, draw = (cfg.length,), torch.float32, _shuffled(cfg.length)
    places = {"lora_idx_A": (site.r, site.d_in), "lora_idx_B": (site.d_out, site.r)}
    kind = positions.index_dtype(cfg.length)
    found = {
        name: ParamSpec(shape, draw, trainable=False, dtype=kind) for name, shape in places.items()
    }
    found["lora_theta"] = ParamSpec(d, uniform(0.02), dtype=wide, group=_GROUP)
    found["lora_gain"] = ParamSpec((), "ones", trainable=False, dtype=wide)
    if cfg.exact_start:
        found["lora_theta0"] = ParamSpec(d, trainable=False, dtype=wide, group=_GROUP)
    if cfg.norms:
        found["lora_norm"] = ParamSpec(d, "ones", trainable=False, dtype=wide)
    return found


def init(
    cfg: UniLoRAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The vector, and what it starts as."""
    if not cfg.exact_start:
        return {}
    theta = uniform(0.02)((cfg.length,), generator("lora_theta"))
    return {"lora_theta": theta, "lora_theta0": theta}


def _count(site: Site) -> int:
    """How many entries a site's factors have."""
    return max(site.num_experts, 1) * site.r * (site.d_in + site.d_out)


def plan(
    cfg: UniLoRAConfig, sites: Sequence[Site], seen: Mapping[str, SiteStatistics]
) -> UniLoRAConfig:
    """The config with the number of entries of all factors."""
    return dataclasses.replace(cfg, total=sum(map(_count, sites)))


def scaling(cfg: UniLoRAConfig, site: Site) -> float:
    """d / D; D is the site's own where it wasn't counted."""
    return 1.0 if cfg.norms else cfg.length / (cfg.total or _count(site))


def _pair(theta: Tensor, p: Params) -> Pair:
    """A (..., r, d_in) and B (..., d_out, r) of a vector (..., d)."""
    length = theta.shape[-1]
    if "lora_norm" in p:
        theta = theta * p["lora_norm"]
    A, B = (
        theta.expand(*idx.shape[:-2], -1).gather(-1, idx.flatten(-2)).view(idx.shape)
        for idx in (positions.decoded(p[f"lora_idx_{side}"], length) for side in "AB")
    )
    return A, B


def _factors(cfg: UniLoRAConfig, p: Params, site: Site, dtype: torch.dtype | None) -> Pair:
    """The update as one factor pair, without s."""
    A, B = _pair(p["lora_theta"], p)
    if "lora_theta0" in p:
        A, B = low_rank.difference(A, B, *_pair(p["lora_theta0"], p))
    return A, B * p["lora_gain"][..., None, None]


_PHASES = made_pair(_factors)


def scale(cfg: UniLoRAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """g times c, since theta is in both factors."""
    return {"lora_gain": p["lora_gain"] * c}


def validate(cfg: UniLoRAConfig, p: Params, site: Site) -> None:
    """Check that the places are in the vector.

    Raises:
        StructureError: one isn't.
    """
    for name in ("lora_idx_A", "lora_idx_B"):
        check_indices((p[name],), (cfg.length,), name, once=False)


VARIANT = Variant(
    name="unilora",
    good_for="one vector for a whole model",
    config=UniLoRAConfig,
    paper="Li et al. 2025, arXiv 2506.00799",
    param_specs=param_specs,
    init=init,
    prepare=_PHASES.prepare,
    outputs=_PHASES.outputs,
    weight=_PHASES.weight,
    additive=True,
    validate=validate,
    scale=scale,
    scaling=scaling,
    low_rank_factors=_PHASES.low_rank_factors,
    batched=True,
    plan=plan,
)
