"""PEFT's LoHa: the elementwise product of two low-rank updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....variants import ABBAConfig, LoHaConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, ranks
from .layer_shapes import through_core
from .tensor_names import renamed, same

__all__ = ["LOHA"]

_NAMES = {f"lora_w{i}_{side}": f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"}


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read hada_w1_a (d_out, r), hada_w1_b (r, d_in) and the same for hada_w2. The update is (w1_a
    w1_b) * (w2_a w2_b) alpha / r. For a convolution, hada_t1 and hada_t2 may stand between the
    factors (use_effective_conv2d).
    """
    alpha = reader.at("alpha_pattern", entry.pattern_path, reader.number("alpha", 8))
    leaves = renamed(held, _NAMES)
    for i in (1, 2):
        if f"hada_t{i}" in held:
            pair = through_core(held[f"hada_t{i}"], leaves[f"lora_w{i}_a"], leaves[f"lora_w{i}_b"])
            leaves[f"lora_w{i}_a"], leaves[f"lora_w{i}_b"] = pair
    return [Part(LoHaConfig, leaves, r=leaves["lora_w1_b"].shape[0], alpha=alpha)]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write hada_w1_a (d_out, r), hada_w1_b (r, d_in) and the same for hada_w2.

    Raises:
        UnsupportedError: the adapters differ in dropout.
    """
    of_config(adapters, "dropout", method="LoHa")
    r, alpha = ranks(adapters)
    return Written({}, same(adapters, **_NAMES), {}, r, alpha)


LOHA = Codec(
    peft_type="LOHA",
    configs=(LoHaConfig, ABBAConfig),
    suffixes=(*_NAMES.values(), "hada_t1", "hada_t2"),
    understood="r alpha rank_pattern alpha_pattern",
    ignored="rank_dropout module_dropout use_effective_conv2d",
    read=read,
    write=write,
    kinds="linear conv1d conv2d",
    alpha="alpha",
)
