"""Combinations of adapters whose update isn't a pair of factors: gates, and HiRA's products."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.config import AdapterConfig
from ..core.errors import UnsupportedError
from ..core.layout import Layout
from ..core.method import site_for
from ..core.registry import variant_for
from ..core.site import Site
from ..variants import HiRAConfig, IA3Config, IA3FFConfig

__all__ = ["FORMS", "Weighted", "as_adapter", "combined_form"]

Weighted = Sequence[tuple[Any, Mapping[str, Tensor], Site]]
"""(weight, a number or a tensor (), tensors, site) of each adapter at one place."""


def _gates(how: str, parts: Weighted) -> dict[str, Tensor]:
    """The weighted sum of gates as in PEFT (linear), or the gate of their summed changes (cat)."""
    start = 1.0 if how == "cat" else 0.0
    gates = torch.stack(
        [(w * (p["lora_g"] - start)).to(p["lora_g"].dtype) for w, p, _ in parts]
    ).sum(0)
    return {"lora_g": gates + start}


def _products(how: str, parts: Weighted) -> dict[str, Tensor]:
    """The products' factors side by side: sum_i w_i W * (s_i B_i A_i) is exactly W * (B A)."""
    A = torch.cat([p["lora_A"] for _, p, _ in parts], dim=-2)
    B = torch.cat(
        [(p["lora_B"] * (w * site.scaling)).to(p["lora_B"].dtype) for w, p, site in parts], dim=-1
    )
    return {"lora_A": A, "lora_B": B}


FORMS: Mapping[
    type[AdapterConfig], tuple[tuple[str, ...], Callable[[str, Weighted], dict[str, Tensor]]]
] = {
    IA3Config: (("cat", "linear"), _gates),
    IA3FFConfig: (("cat", "linear"), _gates),
    HiRAConfig: (("cat",), _products),
}
"""{config: (the ways that it can be combined in, one site's tensors)}."""


def combined_form(config: type[AdapterConfig], how: str, at: Mapping[str, Weighted]) -> Adapter:
    """One adapter of the same method.

    Raises:
        UnsupportedError: a way that makes no sense of this method.
    """
    ways, combine = FORMS[config]
    if how not in ways:
        raise UnsupportedError(
            f"combine_adapters: {variant_for(config).name} can be combined by {', '.join(ways)}, "
            f"found {how!r}"
        )
    made = {path: combine(how, parts) for path, parts in at.items()}
    return as_adapter(config, {path: parts[0][2] for path, parts in at.items()}, made)


def as_adapter(
    config: type[AdapterConfig],
    sites: Mapping[str, Site],
    made: Mapping[str, dict[str, Tensor]],
    **fields: Any,
) -> Adapter:
    """An adapter of strength 1, each site of the rank that its lora_A has; `fields` are its
    config's own.
    """
    ranks = {path: p["lora_A"].shape[-2] if "lora_A" in p else 1 for path, p in made.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    odd = {f"^{re.escape(path)}$": r for path, r in ranks.items() if r != common}
    cfg = config(
        r=common,
        alpha=float(common),
        rank_pattern=tuple(odd.items()),
        alpha_pattern=tuple((k, float(r)) for k, r in odd.items()),
        **fields,
    )
    variant, scale_tensors = variant_for(config), dict[float, Tensor]()
    placed = [
        site_for(
            variant, cfg, dataclasses.replace(s, r=ranks[p], alpha=float(ranks[p])), scale_tensors
        )
        for p, s in sites.items()
    ]
    tensors: dict[str, Any] = dict(made)
    return Adapter(Layout(variant, cfg, placed), tensors)
