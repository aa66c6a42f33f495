"""PEFT's GLoRA: the weight multiplied and shifted, the bias too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.site import Params, Site
from ....variants import GLoRAConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, one_of, ranks, refuse_dropout

__all__ = ["GLORA"]

_FORMS = {"weight_form": "config_A_B", "prompt_form": "config_C", "bias_form": "config_D_E"}
_DEFAULTS = {"config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"}


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read the paths glora_A to glora_E, each Xd and Xu, or X. Paths that are absent are dense
    zeros in a file, and are left out. A module may have none.

    Raises:
        ModelNeededError: no model was given.
    """
    entry.known("GLoRA's paths depend on whether the layer has a bias")
    leaves: dict[str, Tensor] = {}
    for name in "ABCDE":
        path = f"glora_{name}"
        if f"{path}.Xd" in held:
            leaves[f"lora_{name}_d"] = held[f"{path}.Xd"]
            leaves[f"lora_{name}_u"] = held[f"{path}.Xu"]
        elif f"{path}.X" in held:
            X = held[f"{path}.X"].flatten()
            leaves[f"lora_{name}_x"] = X[0] if _is_number(reader, name) else X
    forms = {ours: reader.get(theirs, _DEFAULTS[theirs]) for ours, theirs in _FORMS.items()}
    return [Part(GLoRAConfig, leaves, forms, reader.whole("r", 8))] if leaves else []


def _is_number(reader: ConfigReader, name: str) -> bool:
    field = {"A": "config_A_B", "B": "config_A_B", "C": "config_C"}.get(name, "config_D_E")
    return bool(reader.get(field, _DEFAULTS[field]) == "constant")


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write the paths glora_A to glora_E.

    Raises:
        UnsupportedError: the sites differ in a setting, or inputs are dropped.
    """
    refuse_dropout(adapters, "GLoRA")
    said = of_config(adapters, *_FORMS, method="GLoRA")
    tensors = {
        path: {
            f"glora_{name}.{key}": t
            for name in "ABCDE"
            for key, t in _path(name, held, a.sites[path]).items()
        }
        for a in adapters
        for path, held in a.items()
    }
    fields = {theirs: said[ours] for ours, theirs in _FORMS.items()}
    return Written(fields | {"r": one_of(ranks(adapters)[0], "GLoRA", "r")}, tensors)


def _path(name: str, held: Params, site: Site) -> dict[str, Tensor]:
    """Return a path's tensors as PEFT has them, which are zeros of the whole size where there is
    none.
    """
    if f"lora_{name}_d" in held:
        return {"Xd": held[f"lora_{name}_d"], "Xu": held[f"lora_{name}_u"]}
    whole = {"C": (site.d_in, 1), "D": (site.d_out,), "E": (site.d_out,)}
    if f"lora_{name}_x" not in held:
        return {"zeros": torch.zeros(whole.get(name, (site.d_out, site.d_in)))}
    x = held[f"lora_{name}_x"].reshape(-1)
    return {"X": x[:, None] if name in "ABC" and held[f"lora_{name}_x"].ndim else x}


def bias_gain(held: Mapping[str, Tensor]) -> Tensor:
    """Return what the layer's bias is multiplied by, (1,) or (d_out,): PEFT's is b + b * D."""
    D = held.get("glora_D.X")
    return torch.ones(1) if D is None else 1.0 + D.flatten()


GLORA = Codec(
    peft_type="GLORA",
    configs=(GLoRAConfig,),
    suffixes=tuple(f"glora_{name}.{t}" for name in "ABCDE" for t in ("Xd", "Xu", "X", "zeros")),
    understood="r config_A_B config_C config_D_E",
    read=read,
    write=write,
    biased="glora_only",
    bias_gain=bias_gain,
)
