"""PEFT's SHiRA: chosen entries of the weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError, short_repr
from ....variants import (
    SHiRAConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import ranks

__all__ = ["SHIRA"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read shira_weight (n,) and shira_indices (2, n), which hold rows and columns.

    Raises:
        CheckpointError: the indices aren't rows and columns of the weight.
        ModelNeededError: no model was given.
    """
    site = entry.known("SHiRA has entries of the weight alone")
    r, where = reader.whole("r", 32), held["shira_indices"]
    size = torch.tensor([site.d_out, site.d_in])
    if (
        where.ndim != 2
        or where.shape[0] != 2
        or bool(((where < 0) | (where >= size[:, None])).any())
    ):
        raise CheckpointError(
            f"{short_repr(entry.path)}: shira_indices: expected rows and columns within "
            f"{site.d_out} x {site.d_in}"
        )
    return [
        Part(
            SHiRAConfig,
            {"lora_v": held["shira_weight"], "lora_idx": where.to(torch.float64)},
            {"mask": "rand"},
            r,
        )
    ]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write shira_weight (n,) and shira_indices (2, n), which hold rows and columns.

    Raises:
        UnsupportedError: the sites differ in r, or have another number of entries than PEFT's.
    """
    r, _ = ranks(adapters)
    for a in adapters:
        for path, site in a.sites.items():
            n = a[path]["lora_v"].shape[0]
            if len(set(r.values())) != 1 or n != site.r * (site.d_in + site.d_out):
                raise UnsupportedError(
                    f"to_peft: {path!r}: PEFT's SHiRA trains r (d_in + d_out) entries with one "
                    f"r, found {n} at r={site.r}; merge it"
                )
    tensors = {
        path: {"shira_weight": h["lora_v"], "shira_indices": h["lora_idx"].to(torch.int32)}
        for a in adapters
        for path, h in a.items()
    }
    return Written({"r": next(iter(r.values())), "mask_type": "random", "random_seed": 0}, tensors)


SHIRA = Codec(
    peft_type="SHIRA",
    configs=(SHiRAConfig,),
    suffixes=("shira_weight", "shira_indices"),
    understood="r mask_type random_seed",
    read=read,
    write=write,
    holds=lambda adapter: adapter.config.fraction is None,  # type: ignore[attr-defined]
)
