"""Low-rank adapters as PEFT writes a LoRA: one pair of factors and one scale for each site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....algebra.low_rank_update import factors_at
from ....core.adapter import Adapter
from ....core.config import feature_dropout
from ....core.errors import UnsupportedError
from ....core.site import Params, Site
from ....variants import BitFitConfig, DoRAConfig, VeRAConfig
from ..codec import Written
from ..keys import attention
from .layer_shapes import as_stored
from .tensor_names import shifts_of

__all__ = ["as_lora_bias", "divisor", "is_pair", "write"]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write LoRA and DoRA as they are, and every other update as the pair of factors that its
    method gives (a subtracted start has twice the rank). A BitFit on the same sites becomes
    lora_bias.

    Raises:
        UnsupportedError: PEFT has no form for this mixture.
    """
    low = [a for a in adapters if not isinstance(a.config, BitFitConfig)]
    shifts = shifts_of(adapters)
    dora = _one([isinstance(a.config, DoRAConfig) for a in low], "use_dora")
    rslora = _one([bool(getattr(a.config, "rslora", False)) for a in low], "use_rslora")
    fields = {"use_dora": dora, "use_rslora": rslora, "lora_bias": bool(shifts)}
    made = Written(fields | {"lora_dropout": _dropout(low)}, {})
    tokens = {tuple(getattr(a.config, "invocation_tokens", ())) for a in low}
    if len(tokens) > 1:
        raise UnsupportedError(
            f"to_peft: one LoRA file has one invocation sequence, these adapters have "
            f"{', '.join(map(str, sorted(tokens)))}; write a folder for each"
        )
    if any(tokens):
        made.fields["alora_invocation_tokens"] = list(*tokens)
    for adapter in low:
        for path, site in adapter.sites.items():
            A, B, scale = _pair(adapter, path)
            r = A.shape[-2]
            made.ranks[path], made.alphas[path] = r, scale * divisor(r, rslora)
            made.tensors[path] = as_stored(site, A, B, modules.get(path))
            if dora:
                made.tensors[path]["lora_magnitude_vector"] = _magnitude(adapter, path, modules)
            if shifts:
                shift = shifts.get(path, torch.zeros(site.d_out, dtype=B.dtype))
                made.tensors[path]["lora_B.bias"] = shift / scale if path in shifts else shift
    _complete_attention(made, modules, rslora)
    _refuse_beside_transposed([s for a in low for s in a.sites.values()], modules)
    return made


def as_lora_bias(
    low: Sequence[Adapter], shifts: Mapping[str, Tensor], modules: Mapping[str, Any]
) -> bool:
    """Tell whether learned shifts can be the lora_bias of these adapters. PEFT has it on the output
    of linear layers and convolutions alone.
    """
    sites = [site for a in low for site in a.sites.values()]
    plain = all(s.kind in ("linear", "conv") and attention(modules, s.path) is None for s in sites)
    dora = any(isinstance(a.config, DoRAConfig) for a in low)
    return plain and not dora and shifts.keys() <= {s.path for s in sites}


def divisor(r: int, rslora: bool) -> float:
    """Return what alpha is divided by to give the scale."""
    return math.sqrt(r) if rslora else float(r)


# ------------------------------------------------------------------------------------------ factors
def _pair(adapter: Adapter, path: str) -> tuple[Tensor, Tensor, float]:
    """Return (A, B, s) of a site whose update is s B A, with A (r, d_in) and B (d_out, r). Factors
    of stacked experts have (E, ...) in front.

    Raises:
        UnsupportedError: the method's update isn't such a product.
    """
    variant, held = adapter.layout.variant, adapter[path]
    factors = variant.low_rank_factors or _FACTORS.get(variant.config)
    if factors is None:
        raise UnsupportedError(
            f"to_peft: {path!r}: the update of {variant.name} is no pair of factors, as a LoRA's "
            f"is; write it in its own form (as_lora=False), or merge it"
        )
    A, B, s = factors_at(factors, adapter, path)
    specs = adapter.layout.specs[path]
    dtype = next((t.dtype for name, t in held.items() if specs[name].dtype is None), A.dtype)
    return A.to(dtype), B.to(dtype), float(s)


def is_pair(adapter: Adapter) -> bool:
    """Tell whether an adapter's update is a pair of factors, or what a LoRA keeps beside one."""
    variant = adapter.layout.variant
    return variant.low_rank_factors is not None or variant.config in (*_FACTORS, BitFitConfig)


def _plain_factors(cfg: Any, p: Params, site: Site) -> tuple[Tensor, Tensor, float | Tensor]:
    """Return DoRA's factors. Its magnitudes stand beside them in a file."""
    return p["lora_A"], p["lora_B"], site.scaling


def _scaled_projections(cfg: Any, p: Params, site: Site) -> tuple[Tensor, Tensor, float | Tensor]:
    """Return VeRA's projections with its two vectors multiplied into them."""
    A = p["lora_vera_d"][:, None] * p["lora_vera_A"]
    return A, p["lora_vera_b"][:, None] * p["lora_vera_B"], 1.0


_FACTORS = {DoRAConfig: _plain_factors, VeRAConfig: _scaled_projections}
"""Factors of methods that the runtime doesn't go by them for."""


# --------------------------------------------------------------------------------------- one config
def _one(values: list[bool], name: str) -> bool:
    if len(set(values)) != 1:
        raise UnsupportedError(
            f"to_peft: one LoRA file has one {name}, some of these adapters have it and some don't"
        )
    return values[0]


def _dropout(low: Sequence[Adapter]) -> float:
    """Return the one rate of all sites that have an input to drop. An embedding looks rows up and
    has none, so its rate counts only where there are no others.
    """
    others = [a for a in low if any(s.kind != "embedding" for s in a.sites.values())]
    rates = [feature_dropout(a.config) for a in others or low]
    rate = rates[0]
    if any(other != rate for other in rates):
        raise UnsupportedError(
            f"to_peft: one LoRA file has one dropout, these adapters have {rates}; write a folder "
            f"for each"
        )
    bare = next((p for a in low for p, s in a.sites.items() if s.kind == "parameter"), None)
    if rate and bare is not None:
        raise UnsupportedError(
            f"to_peft: {bare!r}: PEFT drops no inputs of a parameter; set dropout=0.0 for the file"
        )
    return rate


def _refuse_beside_transposed(sites: Sequence[Site], modules: Mapping[str, Any]) -> None:
    """Refuse sites that PEFT gets wrong beside fan_in_fan_out, which is a setting of the whole
    file.
    """
    across = next((s.path for s in sites if s.kind == "linear" and s.transposed), None)
    if across is not None and any(
        s.kind == "parameter" or attention(modules, s.path) is not None for s in sites
    ):
        raise UnsupportedError(
            f"to_peft: {across!r} is stored transposed, beside which PEFT takes no parameters "
            f"and turns attention's out_proj around; write two folders"
        )


# --------------------------------------------------------------------------------- kinds of layer
def _magnitude(adapter: Adapter, path: str, modules: Mapping[str, Any]) -> Tensor:
    """Return a site's magnitudes as (d_out,), or as (1, d_out, 1, ...) for a convolution.

    Raises:
        UnsupportedError: PEFT has no DoRA there, or its DoRA would move a padding row.
    """
    site, m = adapter.sites[path], adapter[path]["lora_m"]
    if site.kind == "parameter" or attention(modules, path) is not None:
        raise UnsupportedError(
            f"to_peft: {path!r}: PEFT has no DoRA of attention or of a parameter; merge it"
        )
    padding = getattr(modules.get(path), "padding_idx", None) if site.kind == "embedding" else None
    if padding is not None:
        row, update = modules[path].weight[padding], adapter[path]["lora_A"][:, padding]
        if bool((row != 0).any() | (update != 0).any()):
            raise UnsupportedError(
                f"to_peft: {path!r}: PEFT's DoRA changes the padding row {padding} too; merge it"
            )
    return m.view(1, -1, *(1 for _ in modules[path].weight.shape[2:])) if site.kind == "conv" else m


def _complete_attention(made: Written, modules: Mapping[str, Any], rslora: bool) -> None:
    """Give both projections of each attention a pair of one rank and one scale. PEFT adapts both or
    none, and adds the second's update twice in each call.
    """
    found = (attention(modules, path) for path in made.tensors)
    for parent in {path for path in found if path is not None}:
        times = {f"{parent}.in_proj_weight": 1.0, f"{parent}.out_proj": 2.0}
        scales = {
            path: made.alphas[path] / divisor(made.ranks[path], rslora) / n
            for path, n in times.items()
            if path in made.tensors
        }
        if modules[parent].in_proj_weight is None:
            raise UnsupportedError(
                f"to_peft: {parent!r}: PEFT adapts attention whose keys and values are as wide as "
                f"its queries alone; merge it"
            )
        r, common = max(made.ranks[path] for path in scales), next(iter(scales.values()))
        width = modules[parent].embed_dim
        for path in times:
            inputs = path.endswith("in_proj_weight")
            rows = modules[parent].in_proj_weight.shape[0] if inputs else width
            nothing = {
                "lora_A.weight": torch.zeros(0, width),
                "lora_B.weight": torch.zeros(rows, 0),
            }
            A, B = (made.tensors.get(path) or nothing).values()
            ratio = scales.get(path, common) / common if common else 1.0
            more = r - A.shape[0]
            made.tensors[path] = {
                "lora_A.weight": F.pad(A, (0, 0, 0, more)),
                "lora_B.weight": F.pad(B if ratio == 1.0 else B * ratio, (0, more)),
            }
            made.ranks[path], made.alphas[path] = r, common * divisor(r, rslora)
