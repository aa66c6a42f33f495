"""Low-rank adapters as PEFT writes a LoRA: each site's update as one pair of factors in its layer's shapes, one scale a site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError
from ....core.site import Site
from ....variants import (
    ASVDConfig,
    BitFitConfig,
    CorDAConfig,
    DeLoRAConfig,
    DoRAConfig,
    LoRAGAConfig,
    OLoRAConfig,
    PiSSAConfig,
    VeRAConfig,
)
from ..codec import Written, of_config, shifts_of
from ..keys import attention

__all__ = ["LOW_RANK", "as_lora_bias", "divisor", "kernel", "without_padding", "write"]

LOW_RANK = (PiSSAConfig, OLoRAConfig, CorDAConfig, ASVDConfig, LoRAGAConfig, DeLoRAConfig)
"""Methods whose `prepare` gives their update as one pair of factors."""


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """LoRA and DoRA as they are, subtracted starts as one pair of twice the rank; a BitFit on the
    same sites as lora_bias.

    Raises:
        UnsupportedError: PEFT has no form for this mixture.
    """
    low = [a for a in adapters if not isinstance(a.config, BitFitConfig)]
    shifts = shifts_of(adapters)
    dora, rslora = (
        _all([f(a) for a in low], name)
        for f, name in ((_is_dora, "use_dora"), (_is_rslora, "use_rslora"))
    )
    made = Written(
        {
            "use_dora": dora,
            "use_rslora": rslora,
            "lora_bias": bool(shifts),
            "lora_dropout": _dropout(low),
        },
        {},
    )
    for adapter in low:
        for path, site in adapter.sites.items():
            A, B, scale = _pair(adapter, path)
            r = A.shape[-2]
            made.ranks[path], made.alphas[path] = r, scale * divisor(r, rslora)
            made.tensors[path] = held = _named(site, A, B, modules.get(path))
            if dora:
                held["lora_magnitude_vector"] = _magnitude(adapter, path, modules)
            if shifts:
                shift = shifts.get(path)
                held["lora_B.bias"] = (
                    torch.zeros(site.d_out, dtype=B.dtype) if shift is None else shift / scale
                )
    _complete(made, modules, rslora)
    every = [site for a in low for site in a.sites.values()]
    across = next((s.path for s in every if s.kind == "linear" and s.transposed), None)
    if across is not None and any(
        s.kind == "parameter" or attention(modules, s.path) is not None for s in every
    ):
        raise UnsupportedError(
            f"to_peft: {across!r} is stored transposed, beside which PEFT takes no parameters "
            f"and turns attention's out_proj around; "
            "write two folders"
        )
    return made


def as_lora_bias(
    low: Sequence[Adapter], shifts: Mapping[str, Tensor], modules: Mapping[str, Any]
) -> bool:
    """Whether learned biases can be the lora_bias of these: PEFT has it on the output of linear
    layers and convolutions alone.
    """
    sites = [site for a in low for site in a.sites.values()]
    plain = all(s.kind in ("linear", "conv") and attention(modules, s.path) is None for s in sites)
    return plain and not any(map(_is_dora, low)) and shifts.keys() <= {s.path for s in sites}


def divisor(r: int, rslora: bool) -> float:
    """What alpha is divided by."""
    return math.sqrt(r) if rslora else float(r)


def _dropout(low: Sequence[Adapter]) -> float:
    """The one rate of all that have an input to drop; rows that are looked up have none."""
    others = [a for a in low if any(s.kind != "embedding" for s in a.sites.values())]
    rate: float = of_config(others or low, "dropout", method="LoRA")["dropout"]
    bare = next((p for a in low for p, s in a.sites.items() if s.kind == "parameter"), None)
    if rate and bare is not None:
        raise UnsupportedError(
            f"to_peft: {bare!r}: PEFT drops no inputs of a parameter; set dropout=0.0 for the file"
        )
    return rate


def _magnitude(adapter: Adapter, path: str, modules: Mapping[str, Any]) -> Tensor:
    """(d_out,); of a convolution (1, d_out, 1 ...)."""
    site, m = adapter.sites[path], adapter[path]["lora_m"]
    if site.kind == "parameter" or attention(modules, path) is not None:
        raise UnsupportedError(
            f"to_peft: {path!r}: PEFT has no DoRA of attention or of a parameter; merge it"
        )
    padding = getattr(modules.get(path), "padding_idx", None) if site.kind == "embedding" else None
    if padding is not None and bool(
        (modules[path].weight[padding] != 0).any()
        | (adapter[path]["lora_A"][:, padding] != 0).any()
    ):
        raise UnsupportedError(
            f"to_peft: {path!r}: PEFT's DoRA changes the padding row {padding} too; merge it"
        )
    return m.view(1, -1, *(1 for _ in modules[path].weight.shape[2:])) if site.kind == "conv" else m


def _complete(made: Written, modules: Mapping[str, Any], rslora: bool) -> None:
    """Of attention PEFT adapts both projections, with one rank and one scale, and adds the second's
    update twice in each call.
    """
    for home in {home for path in made.tensors if (home := attention(modules, path)) is not None}:
        times = {f"{home}.in_proj_weight": 1.0, f"{home}.out_proj": 2.0}
        scales = {
            p: made.alphas[p] / divisor(made.ranks[p], rslora) / t
            for p, t in times.items()
            if p in made.tensors
        }
        r, width = max(made.ranks[p] for p in scales), modules[home].embed_dim
        common = next(iter(scales.values()))
        for path in times:
            rows = (
                modules[home].in_proj_weight.shape[0] if path.endswith("in_proj_weight") else width
            )
            held = made.tensors.get(path) or {
                "lora_A.weight": torch.zeros(0, width),
                "lora_B.weight": torch.zeros(rows, 0),
            }
            A, B = held["lora_A.weight"], held["lora_B.weight"]
            more, times_ours = r - A.shape[0], scales.get(path, common) / common if common else 1.0
            made.tensors[path] = {
                "lora_A.weight": F.pad(A, (0, 0, 0, more)),
                "lora_B.weight": F.pad(B if times_ours == 1.0 else B * times_ours, (0, more)),
            }
            made.ranks[path], made.alphas[path] = r, common * divisor(r, rslora)


def _all(values: list[bool], name: str) -> bool:
    if len(set(values)) != 1:
        raise UnsupportedError(
            f"to_peft: one LoRA file has one {name}, some of these adapters have it and some don't"
        )
    return values[0]


def _is_dora(adapter: Adapter) -> bool:
    return isinstance(adapter.config, DoRAConfig)


def _is_rslora(adapter: Adapter) -> bool:
    return bool(getattr(adapter.config, "rslora", False))


def _pair(adapter: Adapter, path: str) -> tuple[Tensor, Tensor, float]:
    """The update of a site as s B A: A (r, d_in), B (d_out, r), s."""
    held, site, cfg = adapter[path], adapter.sites[path], adapter.config
    if isinstance(cfg, LOW_RANK):
        prepare = adapter.layout.variant.prepare
        assert prepare is not None
        A, B = prepare(cfg, held, site, None)  # type: ignore[arg-type]  # these look at no layer
        return A, B, 1.0 if isinstance(cfg, DeLoRAConfig) else site.scaling
    if isinstance(cfg, VeRAConfig):
        return (
            held["lora_vera_d"][:, None] * held["lora_vera_A"],
            held["lora_vera_b"][:, None] * held["lora_vera_B"],
            1.0,
        )
    return held["lora_A"], held["lora_B"], site.scaling


def _named(site: Site, A: Tensor, B: Tensor, module: Any) -> dict[str, Tensor]:
    if site.kind == "embedding":
        return {"lora_embedding_A": without_padding(A, module), "lora_embedding_B": B}
    if A.ndim == 3:
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    elif site.kind == "conv":
        A, B = kernel(site.path, A, B, module)
    elif site.kind == "parameter" and site.transposed:
        A, B = B.mT, A.mT  # PEFT sees a matrix as it is stored
    elif site.kind not in ("linear", "parameter"):
        raise UnsupportedError(f"to_peft: {site.path!r}: a LoRA on a {site.kind} isn't written")
    return {"lora_A.weight": A, "lora_B.weight": B}


def without_padding(A: Tensor, module: Any) -> Tensor:
    """The factor (r, ids) of an embedding without its part in the padding row, which PEFT would
    move and this library doesn't.
    """
    padding = getattr(module, "padding_idx", None)
    return A if padding is None else A.index_fill(1, torch.tensor([padding], device=A.device), 0.0)


def kernel(path: str, A: Tensor, B: Tensor, module: Any) -> tuple[Tensor, Tensor]:
    """The factors of a convolution's update in the shapes of kernels, (r, c, *k) and (d_out, r, 1
    ...).

    Raises:
        CheckpointError: no model was given.
        UnsupportedError: in groups, which PEFT doesn't keep apart.
    """
    if module is None:
        raise CheckpointError(
            f"to_peft: {path!r}: a convolution's factors have its kernel's shape; give the base "
            f"model"
        )
    if module.groups != 1:
        raise UnsupportedError(
            f"to_peft: {path!r}: PEFT's update of a convolution in {module.groups} groups mixes "
            f"them; merge it"
        )
    shape = module.weight.shape
    return A.unflatten(1, tuple(shape[1:])), B.reshape(*B.shape, *(1 for _ in shape[2:]))
