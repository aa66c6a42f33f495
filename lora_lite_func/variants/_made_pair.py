"""Phases of methods that make a pair of factors of their tensors: y' = y + s (x A^T) B^T.

The methods differ in their tensors and in how A and B are made of those. `_pair.py` has the phases
of methods whose tensors are A and B themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeAlias

import torch
from torch import Tensor

from ..core.phase_functions import Layer, OutputsFn, PrepareFn
from ..core.site import Params, Site
from ..core.type_variables import ConfigT
from ..core.update_functions import Factors, FactorsFn, WeightFn
from ..kernels import low_rank

__all__ = ["MadePair", "Pair", "in_dtype", "made_pair"]

Pair: TypeAlias = tuple[Tensor, Tensor]
"""A (k, d_in) and B (d_out, k)."""


@dataclass(frozen=True)
class MadePair(Generic[ConfigT]):
    """Four functions of a Variant, all of them around one pair of factors."""

    prepare: PrepareFn[ConfigT, Pair]
    outputs: OutputsFn[ConfigT, Pair]
    weight: WeightFn[ConfigT]
    low_rank_factors: FactorsFn[ConfigT]


def in_dtype(p: Params, dtype: torch.dtype | None) -> Params:
    """A site's tensors in a dtype; as they are where it is None."""
    return p if dtype is None else {name: t.to(dtype) for name, t in p.items()}


def made_pair(
    make: Callable[[ConfigT, Params, Site, torch.dtype | None], Pair], *, scaled: bool = True
) -> MadePair[ConfigT]:
    """The functions of a method whose update is s B A.

    Args:
        make: (cfg, p, site, dtype) -> A (k, d_in), B (d_out, k). The dtype is that of the weight,
            float32 at least, where the update goes into one; None in a call, where the factors have
            the dtype of the adapter.
        scaled: whether s is the site's scale; else it is 1.
    """

    def strength(site: Site) -> float | Tensor:
        return site.scale if scaled else 1.0

    def prepare(cfg: ConfigT, p: Params, site: Site, layer: Layer) -> Pair:
        """The update as one factor pair, without s."""
        return make(cfg, p, site, None)

    def outputs(cfg: ConfigT, p: Params, d: Pair, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """y + s (x A^T) B^T."""
        return low_rank.add(y, x, *d, strength(site))

    def weight(
        cfg: ConfigT, p: Params, site: Site, W: Tensor, b: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """W + s B A."""
        return low_rank.add_dense(W, *make(cfg, p, site, W.dtype), strength(site)), b

    def low_rank_factors(cfg: ConfigT, p: Params, site: Site) -> Factors:
        """The update as one factor pair, and s."""
        return (*make(cfg, p, site, None), strength(site))

    return MadePair(prepare, outputs, weight, low_rank_factors)
