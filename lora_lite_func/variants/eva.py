"""EVA: LoRA whose A starts at the directions in which the layer's inputs vary most.

    y' = y + s (x A^T) B^T        s = alpha / r   (rsLoRA: alpha / sqrt(r))
    A (r, d_in), B (d_out, r)
    X = U S V^T, the calibration inputs:   A = V_r^T
    whiten: each row over the root of its mean square, so that x A^T has unit size

Paper: Paischer et al. 2024, arXiv 2410.07170. With rho > 1 the ranks are shared out anew. Of all
sites' directions, at most rho r each, those are kept that explain the largest part of their own
inputs' variance: as many in all as before, each at the strength that it would have had. A site
without any is left alone. The config of the result records it, in rank_pattern, alpha_pattern and
exclude_names.
Identity at the start: B = 0. Needs the second moment of the inputs, once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability, record
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import ParamSpec, Variant
from ..core.site import Site
from ..core.statistics import SiteStatistics
from . import _calibrated, _pair


@dataclass(frozen=True, kw_only=True)
class EVAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
        center: take the mean out of the inputs first; else a strong mean is the first direction.
        whiten: divide each direction by the size of the inputs along it.
        rho: a site's rank may grow by this factor where others' shrink; 1 leaves each its own
            (paper: 2).
    """

    rslora: bool = False
    dropout: float = 0.0
    center: bool = record(False)
    whiten: bool = record(False)
    rho: float = record(1.0)

    def validate(self) -> None:
        probability(self.dropout, "EVAConfig.dropout")
        if not 1.0 <= self.rho < math.inf:
            raise ConfigError(
                f"EVAConfig.rho: a rank grows at most by this factor, expected at least 1, found "
                f"{self.rho}"
            )


def param_specs(cfg: EVAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (r, d_in), lora_B (d_out, r).

    Raises:
        UnsupportedError: more directions than input features.
    """
    if site.r > site.d_in:
        raise UnsupportedError(
            f"EVA finds directions in {site.d_in} input features, expected a rank of at most "
            f"that, found r={site.r}"
        )
    return _pair.factor_specs(site)


def init(
    cfg: EVAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: SiteStatistics,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The top r eigenvectors of the second moment, each with its largest entry positive.

    Raises:
        ConfigError: fewer tokens than directions, or inputs that are all zero.
    """
    _calibrated.check_tokens(stats, site.r, "EVA")
    C = _moment(cfg, stats)
    values, vectors = torch.linalg.eigh(C)  # ascending
    A = vectors[:, -site.r :].flip(1).mT  # (r, d_in)
    A = A * A.gather(1, A.abs().argmax(1, keepdim=True)).sign()
    if cfg.whiten:
        sizes = values[-site.r :].flip(0)  # (r,), mean squares of the inputs along each row
        A = A / sizes.clamp_min(torch.finfo(torch.float32).eps * sizes[0]).sqrt()[:, None]
    return {"lora_A": A}


def _moment(cfg: EVAConfig, seen: SiteStatistics) -> Tensor:
    """Mean of x^T x, (d_in, d_in), of the centred inputs if asked."""
    C = _calibrated.wide(seen.second)
    if not cfg.center:
        return C
    mean = _calibrated.wide(seen.mean)
    return C - torch.outer(mean, mean)


def plan(cfg: EVAConfig, sites: Sequence[Site], seen: Mapping[str, SiteStatistics]) -> EVAConfig:
    """The config with the ranks shared out anew.

    Raises:
        ConfigError: fewer tokens than directions, or inputs that are all zero.
    """
    if cfg.rho == 1.0:
        return cfg
    shares: list[Tensor] = []
    known: dict[int, Tensor] = {}  # sites with one input have one sum
    for site in sites:
        stats = seen[site.path]
        most = min(int(cfg.rho * site.r), site.d_in)
        _calibrated.check_tokens(stats, most, f"site {site.path!r}: EVA")
        key = id(stats.moments)
        if key not in known:
            values = torch.linalg.eigvalsh(_moment(cfg, stats)).flip(0)  # descending
            known[key] = values / values.sum()
        shares.append(known[key][:most])
    order = torch.cat(shares).argsort(descending=True, stable=True)[: sum(site.r for site in sites)]
    owner = torch.repeat_interleave(
        torch.arange(len(sites)), torch.tensor([len(s) for s in shares])
    )
    ranks = torch.bincount(owner[order.cpu()], minlength=len(sites)).tolist()
    names = [f"^{re.escape(site.path)}$" for site in sites]
    strong = [
        site.alpha * (r / site.r) ** (0.5 if cfg.rslora else 1.0)
        for r, site in zip(ranks, sites, strict=True)
    ]
    kept = [i for i, r in enumerate(ranks) if r]
    return dataclasses.replace(
        cfg,
        rho=1.0,
        rank_pattern=tuple((names[i], ranks[i]) for i in kept),
        alpha_pattern=tuple((names[i], strong[i]) for i in kept),
        exclude_names=(*cfg.exclude_names, *(names[i] for i, r in enumerate(ranks) if not r)),
    )


def scaling(cfg: EVAConfig, site: Site) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    return site.alpha / (site.r**0.5 if cfg.rslora else site.r)


VARIANT = Variant(
    name="eva",
    good_for="ranks and starts fitted to data",
    config=EVAConfig,
    paper="Paischer et al. 2024, arXiv 2410.07170",
    param_specs=param_specs,
    init=init,
    outputs=_pair.outputs,
    weight=_pair.weight,
    additive=True,
    scale=_pair.scale,
    low_rank_factors=_pair.low_rank_factors,
    called_outputs=_pair.called_outputs,
    scaling=scaling,
    batched=True,
    plan=plan,
    needs=frozenset({"inputs"}),
)
