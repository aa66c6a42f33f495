"""SHiRA: a few entries of the weight are trained, at fixed places.

    W' = W + D,   D zero but for D[o_k, i_k] = v_k
    v (n,), places lora_idx (2, n);   n = r (d_in + d_out), as many as a LoRA's, or a fraction

Masks: "rand" (the same for every layer of a shape), "struct" (r rows and r columns, evenly spaced,
and the diagonal), "magnitude" (the largest entries of W), "smallest" (its smallest), "grad" (the
largest of the gradient G of a loss in W), "snip" (of W * G).
Paper: Bhardwaj et al. 2024, arXiv 2406.13175. Super-Tuning, arXiv 2607.09287, is "magnitude" with
fraction 0.01; Supra is a LoRA beside it, a tuple of both. D is built for the call: to gather
(tokens, n) entries costs more than one dense product unless n is tiny.
Identity at the start: v = 0. Needs x and y; the weight or a gradient once, if the mask does. alpha
has no part in this method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.config import AdapterConfig, added, probability, record
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import MATRICES, Layer, ParamSpec, Variant
from ..core.site import Params, Site
from ..core.statistics import SiteStatistics
from ..kernels import low_rank, positions
from ..kernels.indices import check_indices


@dataclass(frozen=True, kw_only=True)
class SHiRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r sets the number of entries; alpha has no part in this
    method), and:

    Args:
        mask: which entries: "rand", "struct", "magnitude", "smallest", "grad" or "snip".
        fraction: what part of the weight's entries, in (0, 1], instead of as many as r says.
        projection_seed: of the random mask.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    mask: Literal["rand", "struct", "magnitude", "smallest", "grad", "snip"] = "rand"
    fraction: float | None = added(None)
    projection_seed: int = record(0)
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "SHiRAConfig.dropout")
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise ConfigError(
                f"SHiRAConfig.fraction: expected a part of the entries in (0, 1], found "
                f"{self.fraction}"
            )
        if self.fraction is not None and self.mask == "struct":
            raise ConfigError(
                "SHiRAConfig.fraction: the mask 'struct' has r rows and columns; choose another"
            )


_MOST_ROWS = 2**16


def _struct(site: Site) -> Tensor:
    """Entry numbers of r rows, r columns and the diagonal."""
    rows, columns = (torch.zeros(d, dtype=torch.bool) for d in (site.d_out, site.d_in))
    rows[torch.arange(site.r) * site.d_out // site.r] = True
    columns[torch.arange(site.r) * site.d_in // site.r] = True
    mask = rows[:, None] | columns | torch.eye(site.d_out, site.d_in, dtype=torch.bool)
    return mask.flatten().nonzero().squeeze(1)


def _count(cfg: SHiRAConfig, site: Site) -> int:
    if cfg.fraction is not None:
        return int(site.d_out * site.d_in * cfg.fraction)
    if cfg.mask != "struct":
        return site.r * (site.d_in + site.d_out)
    if site.r > _MOST_ROWS:
        raise UnsupportedError(
            f"SHiRA's mask 'struct' counts its rows one by one, expected r of at most "
            f"{_MOST_ROWS}, found {site.r}"
        )
    short = min(site.d_in, site.d_out)
    # diagonal entries that are in a chosen row or column
    covered = {i * d // site.r for d in (site.d_out, site.d_in) for i in range(site.r)}
    return site.r * (site.d_in + site.d_out - site.r) + short - sum(i < short for i in covered)


def param_specs(cfg: SHiRAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_v (n,), frozen lora_idx (2, n).

    Raises:
        UnsupportedError: the weight has fewer entries, or the rank is beyond what can be counted.
    """
    if cfg.fraction is None:
        low_rank.check_rank(site, "SHiRA")
    n = _count(cfg, site)
    if n < 1:
        raise UnsupportedError(
            f"SHiRA trains {cfg.fraction} of the entries, which of {site.d_out} x {site.d_in} is "
            f"none; raise fraction"
        )
    if n > site.d_in * site.d_out:
        raise UnsupportedError(
            f"SHiRA trains r (d_in + d_out) = {n} entries, found only {site.d_out} x {site.d_in} "
            f"with r={site.r}; lower r, or set it there with rank_pattern"
        )
    return {"lora_v": ParamSpec((n,)), "lora_idx": positions.spec(n, site.d_out, site.d_in)}


def init(
    cfg: SHiRAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: SiteStatistics,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The places."""
    n = specs["lora_v"].shape[0]
    if cfg.mask == "rand":
        return {"lora_idx": positions.drawn(cfg.projection_seed, n, site.d_out, site.d_in)}
    if cfg.mask == "struct":
        return {"lora_idx": positions.pack(_struct(site), site.d_in)}
    score = {
        "magnitude": lambda: weight,
        "smallest": lambda: weight,
        "grad": lambda: stats.gradient,
        "snip": lambda: stats.gradient * weight.to(stats.gradient),
    }
    chosen = score[cfg.mask]().abs().flatten().topk(n, largest=cfg.mask != "smallest")
    flat = chosen.indices.sort().values
    return {"lora_idx": positions.pack(flat, site.d_in)}


def prepare(cfg: SHiRAConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """D, (d_out, d_in)."""
    return positions.dense(p["lora_idx"], p["lora_v"], site.d_out, site.d_in)


def outputs(cfg: SHiRAConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + x D^T."""
    return (y + low_rank.project(x, d)).to(y.dtype)


def weight(
    cfg: SHiRAConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + D."""
    return W + positions.dense(p["lora_idx"], p["lora_v"].to(W.dtype), site.d_out, site.d_in), b


def dense(cfg: SHiRAConfig, site: Site, tokens: int) -> bool:
    """Always: the phases take a dense product of their own."""
    return True


def scale(cfg: SHiRAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """v times c."""
    return {**p, "lora_v": p["lora_v"] * c}


def validate(cfg: SHiRAConfig, p: Params, site: Site) -> None:
    """The entries are different ones of the matrix.

    Raises:
        StructureError: they aren't.
    """
    rows, columns = p["lora_idx"].unbind(-2)
    check_indices((rows, columns), (site.d_out, site.d_in), "lora_idx")


_NEEDS = {
    "magnitude": frozenset({"weight"}),
    "smallest": frozenset({"weight"}),
    "grad": frozenset({"gradients"}),
    "snip": frozenset({"weight", "gradients"}),
}

VARIANT = Variant(
    name="shira",
    good_for="adapters that are switched and added",
    config=SHiRAConfig,
    paper="Bhardwaj et al. 2024, arXiv 2406.13175",
    param_specs=param_specs,
    init=init,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    additive=True,
    validate=validate,
    dense=dense,
    scale=scale,
    needs=frozenset({"weight", "gradients"}),
    needs_by=lambda cfg: _NEEDS.get(cfg.mask, frozenset()),
    sites=(*MATRICES, "embedding"),
)
