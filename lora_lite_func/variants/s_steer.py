"""S-steer: steering without training, along singular directions in which contrastive pairs differ.

    y' = y + U (S * delta * (V x))
    W = U S V,   U (d_out, r), S (r,), V (r, d_in), delta (r,)
    delta = m / |m|,   m = sqrt(S) * mean over pairs of V (x+ - x-)
    x is the layer's input at the last token

Each singular pair (u_i, v_i) is turned so that V x+ > V x- in at least half of the pairs. That
leaves W alone and makes delta's entries mostly positive, so a strength above zero amplifies what
sets the positive texts apart. The r directions with the largest |delta| are kept.
`ll.scale(params, c)` sets the strength: 0 is the base, exactly, -1 steers the other way; the update
is linear in c.

Source: wassname 2026, ssteer-eval-aware and steering-lite (no paper); the untrained relative of
AntiPaSTO, arXiv 2601.07473.
Not the identity at the start: nothing is learned, so it starts as what it does. Needs the weight's
decomposition and pairs at the start, then only x and y. alpha has no part in this method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import ConfigError
from ..core.method import ParamSpec, Variant
from ..core.site import Params, Site
from ..core.statistics import SiteStatistics
from ..kernels import low_rank
from . import _calibrated
from ._made_pair import Pair, made_pair


@dataclass(frozen=True, kw_only=True)
class SSteerConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r is how many singular directions are steered; alpha has no
    part in this method).
    """

    r: int = 64


def param_specs(cfg: SSteerConfig, site: Site) -> dict[str, ParamSpec]:
    """Frozen lora_U (d_out, r), lora_S (r,), lora_Vh (r, d_in), lora_delta (r,): nothing is
    learned.

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "S-steer")
    vector = ParamSpec((site.r,), trainable=False, dtype=torch.float32)
    return {
        "lora_U": ParamSpec((site.d_out, site.r), trainable=False),
        "lora_S": vector,
        "lora_Vh": ParamSpec((site.r, site.d_in), trainable=False),
        "lora_delta": vector,
    }


def init(
    cfg: SSteerConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: SiteStatistics,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The oriented singular directions in which the pairs differ most.

    Raises:
        ConfigError: the pairs don't differ here.
    """
    W = _calibrated.wide(weight)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)  # (d_out, k), (k,), (k, d_in)
    positive, negative = _calibrated.wide(stats.pairs).to(W.device)
    apart = (positive - negative) @ Vh.mT  # (n, k)
    sign = torch.where((apart > 0).double().mean(0) >= 0.5, 1.0, -1.0).to(W)  # (k,)
    m = S.sqrt() * apart.mean(0) * sign
    size = m.norm()
    if not bool(size > 0):
        raise ConfigError(
            "S-steer: the positive and the negative inputs are the same here; give pairs that "
            "differ, or leave it out"
        )
    kept = m.abs().topk(site.r).indices.sort().values
    delta = (m / size)[kept]
    return {
        "lora_U": (U * sign)[:, kept],
        "lora_S": S[kept],
        "lora_Vh": (Vh * sign[:, None])[kept],
        "lora_delta": delta,
    }


def _factors(cfg: SSteerConfig, p: Params, site: Site, dtype: torch.dtype | None) -> Pair:
    """diag(S delta) V (r, d_in), and U (d_out, r)."""
    dtype = p["lora_Vh"].dtype if dtype is None else dtype
    gain = (p["lora_S"] * p["lora_delta"]).to(dtype)
    return gain[:, None] * p["lora_Vh"].to(dtype), p["lora_U"].to(dtype)


_PHASES = made_pair(_factors, scaled=False)


def scale(cfg: SSteerConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """delta times c."""
    return {**p, "lora_delta": p["lora_delta"] * c}


VARIANT = Variant(
    name="s_steer",
    good_for="steering by examples, without any training",
    config=SSteerConfig,
    param_specs=param_specs,
    init=init,
    prepare=_PHASES.prepare,
    outputs=_PHASES.outputs,
    weight=_PHASES.weight,
    scale=scale,
    needs=frozenset({"weight", "pairs"}),
)
