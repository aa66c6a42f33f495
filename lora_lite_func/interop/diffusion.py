"""from_diffusion: LoRA, LoHa and LoKr in the key styles of diffusers and of kohya's scripts and LyCORIS.

diffusers   unet.<path>.lora_A.weight, .lora_B.weight;  older: <path>.lora.down.weight, <path>.processor.to_q_lora.down.weight
kohya       lora_unet_<path with _ for .>.lora_down.weight, .lora_up.weight;  .hada_w1_a ...;  .lokr_w1 ...
both        <the same>.alpha, a number: the scale is alpha / r, and 1 where there is none
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.errors import CheckpointError, ConfigError, nearest, short_repr
from ..io.files import parse_json, read_safetensors
from ..variants import LoHaConfig, LoKrConfig, LoRAConfig
from .assembly import ModuleEntry, Part, assemble, check_tensors
from .peft.methods.lora import factors
from .peft.modules import adaptable

__all__ = ["from_diffusion"]

_COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "unet": ("unet.", "lora_unet_"),
    "transformer": ("transformer.", "lora_transformer_", "lora_unet_"),
    "text_encoder": ("text_encoder.", "lora_te1_", "lora_te_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
    "text_encoder_3": ("text_encoder_3.", "lora_te3_"),
    "model": ("diffusion_model.", "lycoris_", ""),
}
_DOWN = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "down.weight")
_UP = ("lora_up.weight", "lora_B.weight", "lora.up.weight", "up.weight")
_OTHERS = tuple(f"hada_w{i}_{s}" for i in (1, 2) for s in "ab") + tuple(
    f"lokr_w{i}{s}" for i in (1, 2) for s in ("", "_a", "_b")
)
_SUFFIXES = tuple(sorted((*_DOWN, *_UP, *_OTHERS, "alpha"), key=len, reverse=True))
_PROCESSOR = re.compile(r"(.*\.)?processor\.(to_[a-z]+|add_[a-z]_proj)_lora")


def from_diffusion(
    source: Any, model: nn.Module, *, component: str | None = None
) -> Adapter | tuple[Adapter, ...]:
    """An adapter for a diffusion model, in diffusers' or kohya's keys: `params =
    ll.from_diffusion("lora.safetensors", pipe.unet)`.

    Args:
        source: a .safetensors file, or a state dict.
        model: the component that is adapted; the underscores of kohya's keys are resolved against
            its paths.
        component: "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3": whose
            keys are read, where the file has several components' (the others' are left out); None
            if it has one.

    Raises:
        CheckpointError: an unreadable file, a key that nothing in the model or here corresponds to,
            that several modules could mean, or a tensor that doesn't fit.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"expected the base, an nn.Module, found {type(model).__name__}")
    if component is not None and component not in _COMPONENTS:
        raise CheckpointError(
            f"component: expected one of {', '.join(_COMPONENTS)}, found {short_repr(component)}"
        )
    tensors, where = source, "the state dict"
    metadata: dict[str, str] = {}
    if not isinstance(source, Mapping):
        where = os.fsdecode(source)
        tensors, metadata = read_safetensors(source)
    alphas = _declared(metadata, where)
    known = {path: path for path in dict(model.named_modules()) if path}
    flat: dict[str, list[str]] = {}
    for path in known:
        flat.setdefault(path.replace(".", "_"), []).append(path)
    try:
        sites = _sites(tensors, where, component, known, flat)
        if not sites:
            raise CheckpointError(
                f"{where}: holds no tensors{'' if component is None else f' of {component}'}"
            )
        entries = adaptable(model, sites)
        return assemble(
            [
                (entry := ModuleEntry(path, {}, *entries[path]), _part(entry, held, where, alphas))
                for path, held in sites.items()
            ]
        )
    except (ConfigError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{where}: {short_repr(str(error))}") from None


def _declared(metadata: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """The numbers that diffusers writes as JSON, by its own name for the entry."""
    text = metadata.get("lora_adapter_metadata")
    reader = {} if text is None else parse_json(text, f"{where}: lora_adapter_metadata")
    if not isinstance(reader, dict):
        raise CheckpointError(
            f"{where}: lora_adapter_metadata: expected an object, found "
            f"{short_repr(json.dumps(reader))}"
        )
    short = {key.rpartition(".")[2]: value for key, value in reader.items()}
    for name in ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern"):
        if short.get(name):
            raise CheckpointError(
                f"{where}: {name} is {short_repr(short[name])}, which isn't read in this form; "
                f"use from_peft"
            )
    return short


def _sites(
    tensors: Any,
    where: str,
    component: str | None,
    known: Mapping[str, str],
    flat: Mapping[str, list[str]],
) -> dict[str, dict[str, Tensor]]:
    sites: dict[str, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        if not isinstance(key, str) or not isinstance(t, Tensor):
            raise CheckpointError(f"{where}: expected names and tensors, found {short_repr(key)}")
        of = next(
            (
                name
                for name, starts in _COMPONENTS.items()
                if any(s and key.startswith(s) for s in starts)
            ),
            "model",
        )
        wanted = (
            _COMPONENTS[component]
            if component is not None
            else tuple(s for starts in _COMPONENTS.values() for s in starts)
        )
        start = next((s for s in wanted if key.startswith(s) and (s or of == "model")), None)
        if start is None:
            continue  # another component's, when one was asked for
        path, name = _split(key[len(start) :], where)
        found = _resolved(path, where, known, flat)
        if name != "alpha":
            check_tensors({key: t})
        if name in sites.setdefault(found, {}):
            raise CheckpointError(
                f"{where}: two tensors {name} for {short_repr(found)}; name the component whose "
                f"keys should be read"
            )
        sites[found][name] = t
    return sites


def _split(key: str, where: str) -> tuple[str, str]:
    name = next((s for s in _SUFFIXES if key.endswith("." + s)), None)
    if name is None:
        raise CheckpointError(
            f"{where}: unexpected tensor {short_repr(key)}; read are LoRA, LoHa and LoKr, "
            f"without mid (CP) factors or DoRA"
        )
    path = key[: -len(name) - 1]
    old = _PROCESSOR.fullmatch(path)
    if old is not None:
        path = (old[1] or "") + ("to_out.0" if old[2] == "to_out" else old[2])
    return path, "down" if name in _DOWN else "up" if name in _UP else name


def _resolved(
    path: str, where: str, known: Mapping[str, str], flat: Mapping[str, list[str]]
) -> str:
    if path in known:
        return path
    several = flat.get(path, [])
    if len(several) == 1:
        return several[0]
    if several:
        raise CheckpointError(
            f"{where}: {short_repr(path)} could be {' or '.join(several)}; its key doesn't say"
        )
    raise CheckpointError(
        f"{where}: the model has no module for {short_repr(path)}; {nearest(path, [*known, *flat])}"
    )


def _part(
    entry: ModuleEntry, held: Mapping[str, Tensor], where: str, declared: Mapping[str, Any]
) -> Part:
    alpha = _alpha(entry, held, where, declared)
    if "down" in held:
        A, B = factors(entry, {"lora_A.weight": held["down"], "lora_B.weight": held["up"]})
        return Part(
            LoRAConfig,
            {"lora_A": A, "lora_B": B},
            {"rslora": False},
            A.shape[0],
            float(A.shape[0]) if alpha is None else alpha,
        )
    if "hada_w1_a" in held:
        r = held["hada_w1_b"].shape[0]
        leaves = {f"lora_w{i}_{s}": held[f"hada_w{i}_{s}"] for i in (1, 2) for s in "ab"}
        return Part(LoHaConfig, leaves, {}, r, float(r) if alpha is None else alpha)
    return _lokr(
        entry,
        {name.replace("lokr", "lora"): t for name, t in held.items() if name != "alpha"},
        alpha,
    )


def _lokr(entry: ModuleEntry, leaves: dict[str, Tensor], alpha: float | None) -> Part:
    """The sizes of the factors tell how the dimensions were split. Two full factors have the scale
    1, whatever alpha says.
    """
    low = [name for name in ("lora_w1_b", "lora_w2_b") if name in leaves]
    site = entry.known("LoKr splits both sizes")
    small_out = (leaves["lora_w1"] if "lora_w1" in leaves else leaves["lora_w1_a"]).shape[0]
    r = leaves[low[0]].shape[0] if low else max(site.d_in, site.d_out)
    fields = {"decompose_both": "lora_w1_b" in leaves}
    for factor in (-1, small_out):
        try:
            found = Part(
                LoKrConfig,
                leaves,
                {**fields, "factor": factor},
                r,
                float(r) if alpha is None or not low else alpha,
            )
            assemble([(entry, found)])
            return found
        except CheckpointError as error:
            reason = error
    raise reason


def _alpha(
    entry: ModuleEntry, held: Mapping[str, Tensor], where: str, declared: Mapping[str, Any]
) -> float | None:
    value: Any = declared.get("lora_alpha")
    if "alpha" in held:
        t = held["alpha"]
        if t.numel() != 1 or t.is_complex() or t.is_meta:
            raise CheckpointError(
                f"{where}: {short_repr(entry.path)}: alpha: expected a number, found shape "
                f"{tuple(t.shape)} of {t.dtype}"
            )
        value = float(held["alpha"])
    if value is not None and (type(value) not in (int, float) or not abs(value) < 1e30):
        raise CheckpointError(
            f"{where}: {short_repr(entry.path)}: alpha: expected a finite number, found "
            f"{short_repr(value)}"
        )
    return None if value is None else float(value)
