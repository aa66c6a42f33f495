"""to_diffusion: adapters as files that diffusers, or ComfyUI, kohya's scripts and LyCORIS, load."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...algebra.flatten import Adapters, flatten
from ...core.errors import CheckpointError, ConfigError, UnsupportedError, nearest, short_repr
from ...io.writing import own_copies, write_safetensors
from ..peft.write import peft_form
from .declared import KEY
from .keys import COMPONENTS
from .kohya import kohya_form

__all__ = ["to_diffusion"]

_STYLES = ("diffusers", "kohya")
_BASE = "base_model.model."


def to_diffusion(
    params: Adapters | Mapping[str, Adapters],
    model: nn.Module | Mapping[str, nn.Module],
    path: str | os.PathLike[str],
    *,
    component: str | None = None,
    style: str = "diffusers",
) -> None:
    """Write an adapter of a diffusion model as one safetensors file: `ll.to_diffusion(params,
    pipe.unet, "lora.safetensors", component="unet")`.

    The style of diffusers has its keys and its metadata (`lora_adapter_metadata`, where alpha,
    ranks and DoRA are). It takes LoRA and whatever is one once it is trained, DoRA, and LoKr. The
    style of kohya has an alpha beside each pair of factors. It also takes LoHa, whole changes
    (diff), learned biases (diff_b) and norms (w_norm, b_norm).

    Args:
        params: the adapter, or several of them; for several components {component: adapter}.
        model: the base it was made for; for several components {component: model}.
        path: the file. An old one is replaced when the new one is whole.
        component: the adapter's component: "unet", "transformer", "text_encoder" ...; None where
            `params` and `model` say so themselves.
        style: "diffusers" or "kohya".

    Raises:
        ConfigError: the style or a component is unknown.
        UnsupportedError: the style has no form for a method or a setting.
        StructureError: `params` is a part of a partition, or a stack.
        CheckpointError: an adapter has rows of a stack, a path is unknown, or the file can't be
            written.
    """
    if style not in _STYLES:
        raise ConfigError(f"to_diffusion: style: {nearest(str(style), _STYLES)}")
    parts = _by_component(params, model, component)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    said: dict[str, Any] = {}
    for name, (adapters, base) in parts.items():
        if style == "kohya":
            held, metadata = kohya_form(adapters, base, _start(name, parts))
            tensors |= own_copies(held)
        else:
            held, fields = _diffusers_form(adapters, base, name)
            said |= {f"{name}.{field}": value for field, value in fields.items()}
            tensors |= held
    if said:
        metadata = {KEY: json.dumps(said, indent=2, sort_keys=True)}
    write_safetensors(tensors, path, {"format": "pt"} | metadata, "to_diffusion")


def _by_component(params: Any, model: Any, component: str | None) -> dict[str, tuple[Any, Any]]:
    """Return {component: (adapters, model)}.

    Raises:
        ConfigError: a component is unknown, or none is given.
        CheckpointError: a component has no model.
    """
    if isinstance(model, Mapping) and not isinstance(model, nn.Module):
        if not isinstance(params, Mapping) or component is not None:
            raise ConfigError(
                "to_diffusion: of several components give both `params` and `model` as "
                "{component: ...}, and no component"
            )
        found = {name: (adapters, model.get(name)) for name, adapters in params.items()}
    elif component is None:
        raise ConfigError(
            f"to_diffusion: give the component that the model is, component='unet'; known are "
            f"{', '.join(_known())}"
        )
    else:
        found = {component: (params, model)}
    for name, (_, base) in found.items():
        if name not in _known():
            raise ConfigError(f"to_diffusion: component: {nearest(str(name), _known(), first=9)}")
        if not isinstance(base, nn.Module):
            raise CheckpointError(
                f"to_diffusion: {name}: expected the base, an nn.Module, found "
                f"{type(base).__name__}"
            )
    return found


def _known() -> list[str]:
    return [name for name in COMPONENTS if name != "model"]


def _start(component: str, parts: Mapping[str, Any]) -> str:
    """Return the prefix of kohya's keys. The only text encoder beside a UNet has no number
    in it.
    """
    alone = component == "text_encoder" and set(parts) <= {"unet", "text_encoder"}
    return {
        "unet": "lora_unet_",
        "transformer": "lora_transformer_",
        "text_encoder": "lora_te_" if alone else "lora_te1_",
        "text_encoder_2": "lora_te2_",
        "text_encoder_3": "lora_te3_",
    }.get(component, "")


def _diffusers_form(
    adapters: Any, base: nn.Module, component: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, PEFT's config). The keys of diffusers are PEFT's behind the component's
    name.

    Raises:
        UnsupportedError: diffusers doesn't load such an adapter.
    """
    try:
        fields, tensors = peft_form(adapters, base)
    except UnsupportedError as error:
        said = str(error).removeprefix("to_peft: ")
        raise UnsupportedError(
            f"to_diffusion: diffusers keeps adapters in PEFT's form: {said}"
        ) from None
    kind = fields["peft_type"]
    extra = next(
        (name for name in ("modules_to_save", "trainable_token_indices") if fields.get(name)), None
    ) or ("bias" if fields.get("bias", "none") != "none" else None)
    if kind not in ("LORA", "LOKR") or extra is not None:
        names = ", ".join(a.layout.variant.name for a, _ in flatten(adapters))
        what = names if extra is None else f"{extra}={short_repr(fields[extra])}"
        raise UnsupportedError(
            f"to_diffusion: diffusers loads LoRA, DoRA and LoKr alone, this is {what}; "
            f'style="kohya" reaches further, and ll.merge bakes anything in'
        )
    return {f"{component}.{key.removeprefix(_BASE)}": t for key, t in tensors.items()}, fields
