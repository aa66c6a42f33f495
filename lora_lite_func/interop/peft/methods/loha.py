"""PEFT's LoHa: the elementwise product of two low-rank updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....variants import (
    LoHaConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, ranks
from .tensor_names import renamed, same

__all__ = ["LOHA"]


_HADA = {f"lora_w{i}_{side}": f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"}


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """hada_w1_a (d_out, r), hada_w1_b (r, d_in), hada_w2_*: (w1_a w1_b) * (w2_a w2_b) alpha / r."""
    alpha = reader.at("alpha_pattern", entry.path, reader.number("alpha", 8))
    return [Part(LoHaConfig, renamed(held, _HADA), r=held["hada_w1_b"].shape[0], alpha=alpha)]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    of_config(adapters, "dropout", method="LoHa")
    r, alpha = ranks(adapters)
    return Written({}, same(adapters, **_HADA), {}, r, alpha)


LOHA = Codec(
    kinds="linear conv1d conv2d",
    alpha="alpha",
    peft_type="LOHA",
    configs=(LoHaConfig,),
    suffixes=tuple(_HADA.values()),
    understood="r alpha rank_pattern alpha_pattern",
    read=read,
    write=write,
)
