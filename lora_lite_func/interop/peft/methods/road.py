"""PEFT's RoAd: rotations of pairs of outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....variants import (
    ROADConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config
from .tensor_names import same

__all__ = ["ROAD"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read road_theta and road_alpha, which are laid out as ours.

    Raises:
        ModelNeededError: no model was given.
    """
    entry.known("RoAd turns outputs alone")
    fields = {
        "mode": reader.get("variant", "road_1"),
        "group_size": reader.whole("group_size", 64, 2),
    }
    return [
        Part(
            ROADConfig,
            {f"lora_{name}": held[name] for name in ("road_theta", "road_alpha")},
            fields,
        )
    ]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write road_theta and road_alpha as they are.

    Raises:
        UnsupportedError: the adapters differ in mode or group size.
    """
    said = of_config(adapters, "mode", "group_size", method="RoAd")
    tensors = same(adapters, lora_road_theta="road_theta", lora_road_alpha="road_alpha")
    return Written({"variant": said["mode"], "group_size": said["group_size"]}, tensors)


ROAD = Codec(
    peft_type="ROAD",
    configs=(ROADConfig,),
    suffixes=("road_theta", "road_alpha"),
    understood="variant group_size",
    read=read,
    write=write,
)
