"""PEFT's Super-Tuning: the largest entries of the weight, and for Supra a LoRA beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError, short_repr
from ....variants import LoRAConfig, SHiRAConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, refuse_dropout

__all__ = ["SUPERTUNING"]

_A, _B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read supertuning_values (n,) at supertuning_indices (n,), which count entries row by row, and
    supertuning_lora_A (r, d_in) and supertuning_lora_B (d_out, r) where the file has them.

    Raises:
        CheckpointError: the indices aren't in the file, or aren't entries of the weight.
        ModelNeededError: no model was given.
    """
    site = entry.known("Super-Tuning has entries of the weight alone")
    if "supertuning_indices" not in held:
        raise CheckpointError(
            f"{reader.where}: no supertuning_indices for {short_repr(entry.path)} "
            f"(save_precomputed_indices=false), and entries of one size could stand in any order; "
            f"save it in PEFT with save_precomputed_indices=True"
        )
    flat = held["supertuning_indices"].long()
    if bool(((flat < 0) | (flat >= site.d_out * site.d_in)).any()):
        raise CheckpointError(
            f"{short_repr(entry.path)}: supertuning_indices: expected entries of {site.d_out} x "
            f"{site.d_in}"
        )
    places = torch.stack([flat // site.d_in, flat % site.d_in]).to(torch.float64)
    fields = {
        "mask": "magnitude" if reader.flag("select_top", True) else "smallest",
        "fraction": 1 - reader.number("sparsity", 0.99),
    }
    parts = [Part(SHiRAConfig, {"lora_v": held["supertuning_values"], "lora_idx": places}, fields)]
    if _A in held:
        r = held[_A].shape[0]
        alpha = reader.number("lora_alpha", 0.0) if reader.get("lora_alpha") else 2.0 * r
        leaves = {"lora_A": held[_A], "lora_B": held[_B]}
        dropout = {"dropout": reader.number("lora_dropout", 0.0)}
        parts.append(Part(LoRAConfig, leaves, dropout, r, alpha, order=1))
    return parts


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write supertuning_values (n,) and supertuning_indices (n,).

    Raises:
        UnsupportedError: the adapters differ in a setting, drop inputs, or have another number of
            entries than PEFT's.
    """
    said = of_config(adapters, "fraction", "mask", method="Super-Tuning")
    refuse_dropout(adapters, "Super-Tuning")
    sparsity = 1 - said["fraction"]
    tensors: dict[str, dict[str, Tensor]] = {}
    for a in adapters:
        for path, held in a.items():
            site = a.sites[path]
            if int(site.d_out * site.d_in * (1 - sparsity)) != held["lora_v"].shape[0]:
                raise UnsupportedError(
                    f"to_peft: {path!r}: PEFT rounds {said['fraction']} of {site.d_out} x "
                    f"{site.d_in} entries otherwise; choose another fraction, or merge it"
                )
            rows, columns = held["lora_idx"].long().unbind(0)
            flat = (rows * site.d_in + columns).to(torch.int32)
            tensors[path] = {"supertuning_values": held["lora_v"], "supertuning_indices": flat}
    fields = {"sparsity": sparsity, "select_top": said["mask"] != "smallest"}
    return Written(fields | {"r": None, "save_precomputed_indices": True}, tensors)


def is_fraction(adapter: Adapter) -> bool:
    """Tell whether a SHiRA's entries are a fraction of the weight's, as PEFT's Super-Tuning
    counts them.
    """
    return adapter.config.fraction is not None  # type: ignore[attr-defined]


SUPERTUNING = Codec(
    peft_type="SUPERTUNING",
    configs=(SHiRAConfig,),
    suffixes=("supertuning_values", "supertuning_indices", _A, _B),
    understood="r sparsity select_top lora_alpha lora_dropout save_precomputed_indices",
    read=read,
    write=write,
    holds=is_fraction,
)
