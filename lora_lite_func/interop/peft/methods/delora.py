"""PEFT's DeLoRA: a low-rank update of bounded size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....variants import (
    DeLoRAConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import ranks
from .tensor_names import columns_rows, same

__all__ = ["DELORA"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read delora_A (r, d_in), delora_B (d_out, r), delora_lambda (1,) and delora_w_norm (d_in,).
    Where the norms are missing, they are computed from the base weight.

    Raises:
        ModelNeededError: the norms are missing and no model was given.
    """
    A, B, strength = held["delora_A"], held["delora_B"], held["delora_lambda"].reshape(())
    norm = held["delora_w_norm"] if "delora_w_norm" in held else entry.weight("DeLoRA").norm(dim=0)
    leaves = {"lora_A": A, "lora_B": B, "lora_lambda": strength, "lora_wnorm": norm}
    return [Part(DeLoRAConfig, leaves, {"init": "zero_B"}, A.shape[0])]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write delora_A (r, d_in), delora_B (d_out, r), delora_lambda (1,) and delora_w_norm
    (d_in,).
    """
    r, _ = ranks(adapters)
    names = {"lora_A": "delora_A", "lora_B": "delora_B", "lora_wnorm": "delora_w_norm"}
    tensors = same(adapters, **names)
    for a in adapters:
        for path, held in a.items():
            tensors[path]["delora_lambda"] = held["lora_lambda"].reshape(1)
    return Written({}, tensors, {}, r)


DELORA = Codec(
    biased="delora_only",
    holds=lambda adapter: getattr(adapter.config, "init", None) != "subtract",
    peft_type="DELORA",
    configs=(DeLoRAConfig,),
    suffixes=("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
    understood="r delora_lambda rank_pattern lambda_pattern",
    ignored="module_dropout",
    read=read,
    write=write,
    sizes=columns_rows("delora_A", "delora_B"),
)
