"""Adapters in the keys of kohya's scripts and of LyCORIS, with an alpha beside each pair of
factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...algebra.flatten import Adapters, flatten
from ...core.adapter import Adapter
from ...core.errors import CheckpointError, UnsupportedError
from ...core.site import Params, Site
from ...layers.kinds import restored
from ...layers.weights import stored
from ...variants import (
    BitFitConfig,
    DoRAConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
)
from ..peft.methods import LORA
from ..peft.methods.lora_write import divisor, is_pair

__all__ = ["kohya_form"]

_BIASES = {"diff_b", "b_norm"}
Tensors = dict[str, Tensor]


def kohya_form(
    params: Adapters, model: nn.Module, start: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a component's adapters.

    Args:
        params: the adapters.
        model: the component.
        start: the prefix of its keys.

    Raises:
        UnsupportedError: these files have no form for a method or a layer.
        CheckpointError: an adapter has rows of a stack, or two paths are one with underscores.
        StructureError: `params` is a stack, or a part of a partition.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    changed: set[tuple[str, str]] = set()
    plain = True
    for adapter, plan in flatten(params):
        if plan is not None:
            raise CheckpointError(
                "to_diffusion: these are rows of a stack; write its members (ll.unstack) one by one"
            )
        plain = plain and _writer(adapter) is _low_rank
        for path, held in _writer(adapter)(adapter, modules):
            flat = start + _flat(path, modules)
            if names.setdefault(flat, path) != path:
                raise CheckpointError(
                    f"to_diffusion: {names[flat]!r} and {path!r} are one name with underscores for "
                    f"dots, {flat!r}; write diffusers' style"
                )
            what = "bias" if set(held) <= _BIASES else "weight"
            if (flat, what) in changed:
                raise UnsupportedError(
                    f"to_diffusion: {path!r} has two adapters of its {what}, of which tools would "
                    f"load one; combine or merge one of them first"
                )
            changed.add((flat, what))
            tensors |= {f"{flat}.{role}": t for role, t in held.items()}
    return tensors, {"ss_network_module": "networks.lora" if plain else "lycoris.kohya"}


def _flat(path: str, modules: Mapping[str, Any]) -> str:
    """Return a path with underscores for dots. It gets the `text_model` that CLIPTextModel of
    transformers 5 lacks.
    """
    nested = "embeddings.token_embedding" in modules
    return ("text_model." + path if nested else path).replace(".", "_")


Written = Iterator[tuple[str, Tensors]]


def _writer(adapter: Adapter) -> Callable[[Adapter, Mapping[str, Any]], Written]:
    known: dict[type, Any] = {
        LoHaConfig: _loha,
        LoKrConfig: _lokr,
        BitFitConfig: _bitfit,
        LNTuningConfig: _ln_tuning,
    }
    config = type(adapter.config)
    if config in known:
        found: Callable[[Adapter, Mapping[str, Any]], Written] = known[config]
        return found
    if is_pair(adapter):
        return _low_rank
    raise UnsupportedError(
        f"to_diffusion: kohya's scripts and LyCORIS have no form for {adapter.layout.variant.name};"
        f" merge it (ll.merge)"
    )


def _alpha(value: float) -> Tensor:
    """Return a number as these files keep it. A 0 would be taken for the rank."""
    return torch.tensor(float(value))


def _refuse(site: Site, kinds: tuple[str, ...]) -> None:
    if site.kind not in kinds or (site.kind == "conv" and site.transposed):
        turned = "transposed " if site.transposed and site.kind == "conv" else ""
        raise UnsupportedError(
            f"to_diffusion: {site.path!r}: kohya's scripts and LyCORIS have no such adapter of a "
            f"{turned}{site.kind}; merge it (ll.merge)"
        )


def _low_rank(adapter: Adapter, modules: Mapping[str, Any]) -> Written:
    """Write LoRA, DoRA, and what is a LoRA once it is trained, with the factors that PEFT's writer
    gives.
    """
    for site in adapter.sites.values():
        _refuse(site, ("linear", "conv"))
    made = LORA.write([adapter], modules)
    for path, held in made.tensors.items():
        A, B, r = held["lora_A.weight"], held["lora_B.weight"], made.ranks[path]
        scale = made.alphas[path] / divisor(r, made.fields["use_rslora"])
        if scale == 0.0:
            B, scale = torch.zeros_like(B), 1.0
        found = {"lora_down.weight": A, "lora_up.weight": B, "alpha": _alpha(scale * r)}
        if isinstance(adapter.config, DoRAConfig):
            found["dora_scale"] = adapter[path]["lora_m"].reshape(-1, *(1 for _ in A.shape[1:]))
        yield path, found


def _loha(adapter: Adapter, modules: Mapping[str, Any]) -> Written:
    for path, held in adapter.items():
        site = adapter.sites[path]
        _refuse(site, ("linear", "conv"))
        found = {f"hada_{name.removeprefix('lora_')}": t for name, t in held.items()}
        if site.alpha == 0.0:
            found["hada_w1_a"] = torch.zeros_like(found["hada_w1_a"])
        yield path, found | {"alpha": _alpha(site.alpha or float(site.r))}


def _lokr(adapter: Adapter, modules: Mapping[str, Any]) -> Written:
    for path, held in adapter.items():
        site = adapter.sites[path]
        _refuse(site, ("linear", "conv"))
        W1, W2 = held.get("lora_w1"), held.get("lora_w2")
        if W1 is not None and W2 is not None and W1.numel() == 1:
            yield path, {"diff": restored(W1 * W2, stored(modules[path], "weight"), site)}
            continue
        found = {f"lokr_{name.removeprefix('lora_')}": t for name, t in held.items()}
        if site.kind == "conv" and "lokr_w2" in found:
            found["lokr_w2"] = _kernel(path, held, modules[path])
        yield path, found | {"alpha": _alpha(site.scaling * site.r)}


def _kernel(path: str, held: Params, module: Any) -> Tensor:
    """Return W2 (k, n) of a convolution as (k, channels, *k).

    Raises:
        UnsupportedError: W1 splits a channel's entries, where LyCORIS splits channels alone.
    """
    channels, *entries = module.weight.shape[1:]
    m = (held["lora_w1"] if "lora_w1" in held else held["lora_w1_b"]).shape[1]
    if channels % m:
        raise UnsupportedError(
            f"to_diffusion: {path!r}: LyCORIS splits the {channels} channels of a kernel, this W1 "
            f"has {m} columns; give the sizes of W1 in LoKrConfig.w1_shapes, or merge it"
        )
    return held["lora_w2"].unflatten(1, (channels // m, *entries))


def _bitfit(adapter: Adapter, modules: Mapping[str, Any]) -> Written:
    for path, held in adapter.items():
        _refuse(adapter.sites[path], ("linear", "conv", "norm"))
        norm = adapter.sites[path].kind == "norm"
        yield path, {"b_norm" if norm else "diff_b": held["lora_b"]}


def _ln_tuning(adapter: Adapter, modules: Mapping[str, Any]) -> Written:
    names = {"lora_ln_w": "w_norm", "lora_ln_b": "b_norm"}
    for path, held in adapter.items():
        yield path, {names[name]: t for name, t in held.items()}
