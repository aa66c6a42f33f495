"""PEFT's MiSS: one block repeated along the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import UnsupportedError
from ....variants import (
    MiSSConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, ranks
from .tensor_names import same

__all__ = ["MISS"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read miss_block, which is (r, d_out), or (d_out / r, r, r) with init_weights="bat", or (r,
    mini_r) with init_weights="mini".

    Raises:
        CheckpointError: init_weights says something else.
        ModelNeededError: no model was given.
    """
    entry.known("MiSS repeats its block along the inputs")
    D, mode = held["miss_block"], reader.get("init_weights", True)
    if mode not in (True, False, "bat", "mini"):
        raise reader.refuse("init_weights", 'true, "bat" or "mini"')
    fields: dict[str, Any] = {
        "mode": mode if isinstance(mode, str) else "plain",
        "dropout": reader.number("miss_dropout", 0.0),
    }
    if mode == "mini":
        fields["mini_r"] = reader.whole("mini_r", 1)
    return [Part(MiSSConfig, {"lora_D": D}, fields, r=D.shape[-1] if mode == "bat" else D.shape[0])]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write miss_block in the shape of its mode, which the config names in init_weights.

    Raises:
        UnsupportedError: the sites differ in r, or the adapters in a setting.
    """
    said, (r, _) = of_config(adapters, "mode", "mini_r", "dropout", method="MiSS"), ranks(adapters)
    if len(set(r.values())) != 1:
        raise UnsupportedError(
            f"to_peft: one MiSS file has one r, these sites have {sorted(set(r.values()))}; "
            f"write a folder for each"
        )
    mode = True if said["mode"] == "plain" else said["mode"]
    fields = {
        "init_weights": mode,
        "mini_r": said["mini_r"],
        "miss_dropout": said["dropout"],
        "r": next(iter(r.values())),
    }
    return Written(fields, same(adapters, lora_D="miss_block"))


MISS = Codec(
    peft_type="MISS",
    configs=(MiSSConfig,),
    suffixes=("miss_block",),
    understood="r mini_r miss_dropout",
    read=read,
    write=write,
    biased="MiSS_only",
)
