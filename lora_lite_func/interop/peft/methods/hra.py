"""PEFT's HRA: Householder reflections of the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import UnsupportedError
from ....variants import (
    HRAConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written

__all__ = ["HRA"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read hra_u (d_in, r), which holds one reflection in each column.

    Raises:
        ModelNeededError: no model was given.
    """
    entry.known("HRA acts on inputs alone")
    U = held["hra_u"].mT
    return [Part(HRAConfig, {"lora_U": U}, r=U.shape[0])]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write hra_u (d_in, r), one reflection in each column.

    Raises:
        UnsupportedError: the sites differ in r.
    """
    tensors = {path: {"hra_u": held["lora_U"].mT} for a in adapters for path, held in a.items()}
    many = {held["hra_u"].shape[1] for held in tensors.values()}
    if len(many) != 1:
        raise UnsupportedError(
            f"to_peft: one HRA file has one r, these sites have {sorted(many)}; write a folder "
            f"for each"
        )
    return Written({"r": many.pop()}, tensors)


HRA = Codec(
    peft_type="HRA",
    configs=(HRAConfig,),
    suffixes=("hra_u",),
    understood="r",
    unread="apply_GS",
    read=read,
    write=write,
    kinds="linear conv2d",
    biased="hra_only",
    undilated=True,
)
