"""PEFT's BEFT: a learned bias on the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....variants import (
    BitFitConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written

__all__ = ["BEFT"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read beft_bias (1, d_out), which is added to the output.

    Raises:
        ModelNeededError: no model was given.
    """
    entry.known("BEFT shifts outputs alone")
    return [Part(BitFitConfig, {"lora_b": held["beft_bias"].flatten()})]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write each site's shift of the output as beft_bias (1, d_out)."""
    return Written(
        {},
        {path: {"beft_bias": held["lora_b"][None]} for a in adapters for path, held in a.items()},
    )


BEFT = Codec(
    peft_type="BEFT",
    configs=(BitFitConfig,),
    suffixes=("beft_bias",),
    understood="",
    read=read,
    write=write,
)
