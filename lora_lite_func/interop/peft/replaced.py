"""Adapters of layers whose own weight or bias is in the file too, or whose weight alone is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.errors import CheckpointError, short_repr
from ...core.shared import site_tensors
from ...variants import BitFitConfig, FullConfig
from ..assembly import ModuleEntry, Part
from ..metadata import ConfigReader
from .codec import Codec
from .keys import WRAPPED
from .modules import adaptable

__all__ = ["multiplied", "on_its_copy", "on_tables", "refuse_unheard"]


def on_its_copy(
    reader: ConfigReader, method: Codec, path: str, rest: Mapping[str, Tensor]
) -> ConfigReader:
    """Return the config for a module. Where the file has a copy of its weight, a start that PEFT
    takes out of the base is out of that copy already.

    Raises:
        CheckpointError: PEFT takes more out of the weight than a LoRA's start.
    """
    rewritten = method.rewrites_base is not None and method.rewrites_base(reader)
    if not rewritten or f"{path}{WRAPPED}.weight" not in rest:
        return reader
    if reader.get("kasa_config"):
        raise CheckpointError(
            f"{reader.where}: {short_repr(path)}: kasa_config beside a copy of the weight isn't "
            f"read; save it in PEFT with save_embedding_layers=False"
        )
    return ConfigReader({**reader, "init_lora_weights": True}, reader.where)


def multiplied(entry: ModuleEntry, part: Part, gains: Mapping[str, Tensor]) -> Part:
    """Return a learned bias's part as what it adds to outputs, where the layer multiplies it."""
    if part.config is not BitFitConfig or entry.path not in gains:
        return part
    shift = part.leaves["lora_b"]
    return dataclasses.replace(part, leaves={"lora_b": shift * gains[entry.path].to(shift)})


def on_tables(
    parts: Sequence[tuple[ModuleEntry, Part]],
    extras: Sequence[tuple[ModuleEntry, Part]],
    model: nn.Module | None,
) -> list[tuple[ModuleEntry, Part]]:
    """Return a module's adapter as one of its weight, where the file has another weight for the
    module.
    """
    replaced = {entry.path for entry, part in extras if part.config is FullConfig}
    moved = []
    for entry, part in parts:
        weight = f"{entry.path}.weight"
        if model is not None and weight in replaced:
            entry = ModuleEntry(weight, entry.shared, *adaptable(model, [weight])[weight])
        moved.append((entry, part))
    return moved


def refuse_unheard(
    reader: ConfigReader, unheard: Sequence[ModuleEntry], found: Adapter | tuple[Adapter, ...]
) -> None:
    """Refuse an adapter that does nothing in PEFT, where it would do something here.

    Raises:
        CheckpointError: the message names the layer.
    """
    for entry in unheard:
        for adapter in found if isinstance(found, tuple) else (found,):
            weight = adapter.layout.variant.weight
            if entry.path not in adapter or weight is None:
                continue
            W, site = entry.weight("PEFT's adapter"), adapter.sites[entry.path]
            p = site_tensors(adapter.layout.shared, adapter._data, entry.path)
            if not torch.allclose(weight(adapter.config, p, site, W, None)[0], W, atol=1e-6):
                raise CheckpointError(
                    f"{reader.where}: {short_repr(entry.path)}: attention reads this layer's bare "
                    f"weight, so PEFT's adapter of it does nothing there; take its tensors out of "
                    f"the file and name it in exclude_modules"
                )
