"""What a method is trained with: where its paper puts it, rank and alpha, its own settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import lora_lite_func as ll
from lora_lite_func.cli.method_options import unused_fields

from ..settings import LEARNING_RATES

__all__ = ["PAPERS", "TARGETS", "config", "fits", "learning_rate"]

TARGETS = r"self_attn\.(q_proj|v_proj)$"
"""Query and value, as LoRA's paper and lora-lite's comparison have it; for all not in PAPERS."""

_ALL = r"\.(q|k|v|o|gate|up|down)_proj$"
_COMMON = r"\.(q|k|v|up|down)_proj$"
_ON_ALL = (
    *("adalora", "asvd", "bitfit", "corda", "eva", "gralora", "lora_ga", "miss", "olora"),
    *("pissa", "road", "ssvd", "vera"),
)
PAPERS = {
    **dict.fromkeys(_ON_ALL, _ALL),
    **dict.fromkeys(("dora", "hira", "randlora", "shira"), _COMMON),
    "ia3": r"self_attn\.(k_proj|v_proj)$",
    "ia3_ff": r"mlp\.down_proj$",
}
"""The layers that a method's paper, or its code, adapts in language models, where that isn't
TARGETS.
"""

# language models of billions take smaller steps: 1e-4 is usual for LoRA where settings has 4e-3
FACTOR = 0.1
FALLBACK = 3e-3
RANK = 8


def learning_rate(method: str) -> float:
    """The peak learning rate of a method, where none was given."""
    return LEARNING_RATES.get(method, FALLBACK) * FACTOR


def config(
    method: str,
    *,
    r: int | None = None,
    alpha: float | None = None,
    targets: str | None = None,
    layers: Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[ll.AdapterConfig, list[str]]:
    """A method's config, and remarks on what was asked for and means nothing to it.

    Where r or alpha isn't given, LoRA's kin get rank 8 and alpha 2 r, others their own defaults.
    """
    variant = ll.variants()[method]
    defaults = {f.name: f.default for f in dataclasses.fields(variant.config)}
    usual = (defaults["r"], defaults["alpha"]) == (8, 16.0)
    unused, remarks = unused_fields(variant), []
    given: dict[str, Any] = {"dtype": torch.float32, "layers": layers}
    rank = RANK if r is None and usual else r
    strength = 2.0 * rank if alpha is None and usual and rank is not None else alpha
    for name, value, asked in (("r", rank, r), ("alpha", strength, alpha)):
        if name not in unused and value is not None:
            given[name] = value
        elif asked is not None:
            remarks.append(f"{method} has no {name}; --{name} {asked} is left out")
    given |= _places(variant, targets or PAPERS.get(method, TARGETS), targets is not None)
    try:
        return variant.config(**{**given, **(settings or {})}), remarks
    except ll.ConfigError as error:
        raise SystemExit(f"{method}: {error}") from None


def _places(variant: Any, targets: str, asked: bool) -> dict[str, Any]:
    """Norms, blocks and the like are chosen by the method itself, unless targets were asked for."""
    if variant.sites[0] == "parameter":
        return {"target_parameters": (targets.removesuffix("$") + r"\.weight$",)}
    return {"target_names": (targets,)} if asked or "linear" in variant.sites else {}


def fits(model: Any, cfg: ll.AdapterConfig, asked: bool) -> tuple[ll.AdapterConfig, list[str]]:
    """The config, or the same on every linear layer where this model's have other names and no
    targets were asked for; with a remark.

    Raises:
        SystemExit: what was asked for isn't there.
    """
    try:
        ll.targets(model, cfg)
    except ll.TargetError as error:
        if asked or not cfg.target_names:
            raise SystemExit(str(error)) from None
        wider = dataclasses.replace(cfg, target_names=())
        try:
            ll.targets(model, wider)
        except ll.LoraLiteError:
            raise SystemExit(str(error)) from None
        return wider, [f"{error}; every linear layer is adapted instead"]
    except ll.UnsupportedError as error:
        raise SystemExit(str(error)) from None
    return cfg, []
