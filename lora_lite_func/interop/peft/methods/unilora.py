"""PEFT's UniLoRA: one vector, and at each module the places in it that the factors are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, short_repr
from ....variants import UniLoRAConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, one_of, ranks
from .shared_projections import common_leaf, shared_tensor

__all__ = ["UNILORA"]

_THETA = "unilora_theta_d"


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read unilora_indices_A, unilora_scales_A (r, d_in), unilora_indices_B, unilora_scales_B
    (d_out, r), with the shared unilora_theta_d (d,).

    Raises:
        CheckpointError: a place isn't in the vector, or has two scales.
        ModelNeededError: no model was given.
    """
    entry.known("UniLoRA has a vector for all layers")
    theta = shared_tensor(reader, entry, _THETA)
    norm = torch.zeros_like(theta, dtype=torch.float32)
    leaves = {"lora_theta": theta, "lora_gain": torch.ones(()), "lora_norm": norm}
    for side in "AB":
        where = held[f"unilora_indices_{side}"].long()
        if bool(((where < 0) | (where >= len(theta))).any()):
            raise CheckpointError(
                f"{short_repr(entry.path)}: unilora_indices_{side}: expected places in a vector of "
                f"{len(theta)}"
            )
        norm[where.flatten()] = held[f"unilora_scales_{side}"].flatten().float()
        leaves[f"lora_idx_{side}"] = where.double()
    for side in "AB":
        where = held[f"unilora_indices_{side}"].long()
        if not torch.equal(norm[where], held[f"unilora_scales_{side}"].float()):
            raise CheckpointError(
                f"{short_repr(entry.path)}: unilora_scales_{side}: a place of the vector has two "
                f"scales; UniLoRA gives each place one"
            )
    fields = {
        "length": len(theta),
        "norms": True,
        "exact_start": False,
        "dropout": reader.number("unilora_dropout", 0.0),
    }
    return [Part(UniLoRAConfig, leaves, fields, held["unilora_indices_A"].shape[0])]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write the vector, and the places and scales of each site.

    Raises:
        UnsupportedError: the adapters differ in a setting or in the vector, or the sites in r.
    """
    said = of_config(adapters, "length", "dropout", method="UniLoRA")
    tensors: dict[str, dict[str, Tensor]] = {}
    for a in adapters:
        for path, held in a.items():
            root = torch.tensor(a.sites[path].scaling).sqrt()
            norm = held.get("lora_norm", root.expand(said["length"]))
            own = tensors[path] = {}
            for side in "AB":
                where = held[f"lora_idx_{side}"].long()
                own[f"unilora_indices_{side}"] = where
                own[f"unilora_scales_{side}"] = norm.to(where.device)[where]
    fields = {
        "r": one_of(ranks(adapters)[0], "UniLoRA", "r"),
        "theta_d_length": said["length"],
        "unilora_dropout": said["dropout"],
        "save_indices": True,
    }
    return Written(fields, tensors, {_THETA: common_leaf(adapters, "lora_theta", "UniLoRA")})


def _is_plain(adapter: Adapter) -> bool:
    """Tell whether a file can hold an adapter: without a strength and a start to subtract."""
    if adapter.config.exact_start:  # type: ignore[attr-defined]
        return False
    return all(bool((held["lora_gain"] == 1.0).all()) for held in adapter.values())


UNILORA = Codec(
    peft_type="UNILORA",
    configs=(UniLoRAConfig,),
    suffixes=(
        "unilora_indices_A",
        "unilora_indices_B",
        "unilora_scales_A",
        "unilora_scales_B",
    ),
    understood="r theta_d_length unilora_dropout save_indices",
    ignored="proj_seed init_theta_d_bound",
    read=read,
    write=write,
    shared=(_THETA,),
    biased="unilora_only",
    unsaid="the places in its vector aren't in the file (save_indices=false): PEFT draws them "
    "again with numpy, from the sizes of all targets; save it in PEFT with save_indices=True",
    holds=_is_plain,
    transposed=True,
)
