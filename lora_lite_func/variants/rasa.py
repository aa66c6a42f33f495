"""RaSA: LoRA that gives up some directions of each layer for a pool that all its like share.

    y' = y + (x [A; A_S]^T) diag(d) [B, B_S]^T
    A (r - k, d_in), B (d_out, r - k);   A_S (L k, d_in), B_S (d_out, L k) of all L layers of a kind
    d (r - k + L k,), which starts at alpha / (2 (r - k)) and, for the pool, at alpha / (2 L k)

Paper: He et al. 2025, arXiv 2503.12576. Layers are of a kind where their paths differ in numbers
alone and their sizes don't. A site's rank is r - k + L k; init counts L, and the config of the
result records it in rank_pattern.
Identity at the start: B = B_S = 0. Needs only x and y.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.errors import ConfigError
from ..core.method import MATRICES, ParamSpec, Variant
from ..core.random import Draw
from ..core.shared import kind_of_layer
from ..core.site import Params, Site
from ..core.statistics import SiteStatistics
from ._made_pair import Pair, in_dtype, made_pair


@dataclass(frozen=True, kw_only=True)
class RaSAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; rank_pattern is what init makes it), and:

    Args:
        r: how many directions a layer would have without the pool.
        k: how many of them it gives to the pool.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    r: int = 8
    k: int = 1
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "RaSAConfig.dropout")
        if not 0 < self.k < self.r:
            raise ConfigError(
                f"RaSAConfig.k: expected some of the r={self.r} directions and not all, found "
                f"{self.k}"
            )
        small = [r for _, r in self.rank_pattern if r < self.r]
        if small:
            raise ConfigError(
                f"RaSAConfig.rank_pattern: a layer has the rank r - k + L k, at least r={self.r}, "
                f"found {small[0]}; leave it to init"
            )


def _start(cfg: RaSAConfig, site: Site) -> Draw:
    """Half the strength for a layer's own directions, half for the pool's."""
    own = cfg.r - cfg.k
    pool = site.r - own

    def draw(shape: Sequence[int], gen: torch.Generator) -> Tensor:
        each = [site.alpha / (2 * own)] * own + [site.alpha / (2 * pool)] * pool
        return torch.tensor(each, dtype=torch.float32, device="cpu")

    return draw


def param_specs(cfg: RaSAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (r - k, d_in), lora_B (d_out, r - k), lora_d (r - k + L k,), and lora_shared_A (L k,
    d_in), lora_shared_B (d_out, L k) of all layers of a kind.
    """
    own, kind = cfg.r - cfg.k, kind_of_layer(site)
    pool = site.r - own
    return {
        "lora_A": ParamSpec((own, site.d_in), "kaiming"),
        "lora_B": ParamSpec((site.d_out, own)),
        "lora_d": ParamSpec((site.r,), _start(cfg, site), dtype=torch.float32, rank_axis=0),
        "lora_shared_A": ParamSpec((pool, site.d_in), "kaiming", rank_axis=0, group=kind),
        "lora_shared_B": ParamSpec((site.d_out, pool), rank_axis=1, group=kind),
    }


def plan(cfg: RaSAConfig, sites: Sequence[Site], seen: Mapping[str, SiteStatistics]) -> RaSAConfig:
    """The config with the rank of each site, by the number of layers of its kind."""
    kinds = {site.path: kind_of_layer(site) for site in sites}
    counts = Counter(kinds.values())
    own = cfg.r - cfg.k
    ranks = [(f"^{re.escape(path)}$", own + counts[kind] * cfg.k) for path, kind in kinds.items()]
    return dataclasses.replace(cfg, rank_pattern=tuple(ranks))


def _factors(cfg: RaSAConfig, p: Params, site: Site, dtype: torch.dtype | None) -> Pair:
    """A (r, d_in) and B diag(d) (d_out, r), of the layer's own and the shared directions."""
    p = in_dtype(p, dtype)
    A, B, d = p["lora_A"], p["lora_B"], p["lora_d"]
    pool_A, pool_B = p["lora_shared_A"], p["lora_shared_B"]
    lead = A.shape[:-2]
    A = torch.cat([A, pool_A.expand(*lead, *pool_A.shape[-2:])], dim=-2)
    B = torch.cat([B, pool_B.expand(*lead, *pool_B.shape[-2:])], dim=-1)
    return A, (B * d.unsqueeze(-2)).to(B.dtype)


_PHASES = made_pair(_factors)


def scale(cfg: RaSAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """d times c."""
    return {"lora_d": p["lora_d"] * c}


VARIANT = Variant(
    name="rasa",
    config=RaSAConfig,
    paper="He et al. 2025, arXiv 2503.12576",
    good_for="more rank for LoRA's parameters",
    param_specs=param_specs,
    prepare=_PHASES.prepare,
    outputs=_PHASES.outputs,
    weight=_PHASES.weight,
    additive=True,
    scale=scale,
    scaling=lambda cfg, site: 1.0,
    low_rank_factors=_PHASES.low_rank_factors,
    batched=True,
    plan=plan,
    sites=MATRICES,
)
