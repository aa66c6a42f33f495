"""PEFT's LN-tuning: trained copies of norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, short_repr
from ....layers.weights import stored
from ....variants import (
    LNTuningConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written

__all__ = ["LN_TUNING"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read ln_tuning_layers.weight and ln_tuning_layers.bias, a trained copy of the norm. The parts
    hold its difference from the base's norm.

    Raises:
        CheckpointError: the base's norm has no such parameter, or one of another shape.
        ModelNeededError: no model was given.
    """
    entry.known("LN-tuning replaces the base's norms")
    own = {
        "ln_tuning_layers.weight": ("lora_ln_w", "weight"),
        "ln_tuning_layers.bias": ("lora_ln_b", "bias"),
    }
    leaves = {}
    for name, t in held.items():
        ours, base = own[name][0], stored(entry.module, own[name][1])
        if not isinstance(base, Tensor) or base.shape != t.shape:
            raise CheckpointError(
                f"{short_repr(entry.path)}: its norm has no {own[name][1]} of shape "
                f"{tuple(t.shape)}"
            )
        leaves[ours] = (t - base.detach().to(t)).flatten()
    return [Part(LNTuningConfig, leaves)]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write ln_tuning_layers.weight and ln_tuning_layers.bias: the base's norm with the change
    added, in the shapes of the base's parameters.

    Raises:
        CheckpointError: the base model wasn't given.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for a in adapters:
        for path, held in a.items():
            if path not in modules:
                raise CheckpointError(
                    f"to_peft: {path!r}: PEFT's LN-tuning holds whole norms; give the base model"
                )
            pairs = {
                "weight": held["lora_ln_w"],
                **({"bias": held["lora_ln_b"]} if "lora_ln_b" in held else {}),
            }
            base = {name: stored(modules[path], name).detach() for name in pairs}
            tensors[path] = {
                f"ln_tuning_layers.{n}": base[n] + t.to(base[n]).view(base[n].shape)
                for n, t in pairs.items()
            }
    return Written({}, tensors)


LN_TUNING = Codec(
    peft_type="LN_TUNING",
    configs=(LNTuningConfig,),
    suffixes=("ln_tuning_layers.weight", "ln_tuning_layers.bias"),
    understood="",
    read=read,
    write=write,
    kinds="norm",
)
