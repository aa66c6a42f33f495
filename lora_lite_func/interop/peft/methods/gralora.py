"""PEFT's GraLoRA: a grid of small low-rank updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import UnsupportedError
from ....variants import (
    GraLoRAConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, ranks
from .tensor_names import renamed

__all__ = ["GRALORA"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read gralora_A (k, d_in / k, r) and gralora_B (k, r, d_out / k), and the hybrid part's
    gralora_A_general.weight and gralora_B_general.weight. The scale is alpha / (r + hybrid_r).
    """
    leaves = {"lora_A": held["gralora_A"].mT, "lora_B": held["gralora_B"].mT}
    hybrid = reader.whole("hybrid_r", 0, 0)
    if hybrid:
        leaves |= renamed(
            held,
            {
                "lora_A_whole": "gralora_A_general.weight",
                "lora_B_whole": "gralora_B_general.weight",
            },
        )
    fields = {
        "k": reader.whole("gralora_k", 2),
        "hybrid_r": hybrid,
        "dropout": reader.number("gralora_dropout", 0.0),
    }
    # PEFT's r counts only the grid's directions
    return [Part(GraLoRAConfig, leaves, fields, reader.whole("r", 32), reader.number("alpha", 64))]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write gralora_A (k, d_in / k, r) and gralora_B (k, r, d_out / k), and the factors of the
    hybrid part where there is one.

    Raises:
        UnsupportedError: the sites differ in r or alpha, or the adapters in a setting.
    """
    said = of_config(adapters, "k", "hybrid_r", "dropout", method="GraLoRA")
    r, alpha = ranks(adapters)
    if len(set(r.values())) != 1 or len(set(alpha.values())) != 1:
        raise UnsupportedError(
            "to_peft: one GraLoRA file has one r and one alpha; write a folder for each"
        )
    fields = {
        "gralora_k": said["k"],
        "hybrid_r": said["hybrid_r"],
        "gralora_dropout": said["dropout"],
    }
    tensors = {}
    for a in adapters:
        for path, held in a.items():
            tensors[path] = {"gralora_A": held["lora_A"].mT, "gralora_B": held["lora_B"].mT}
            if said["hybrid_r"]:
                whole = {
                    "gralora_A_general.weight": held["lora_A_whole"],
                    "gralora_B_general.weight": held["lora_B_whole"],
                }
                tensors[path] |= whole
    return Written(
        fields | {"r": next(iter(r.values())), "alpha": next(iter(alpha.values()))}, tensors
    )


GRALORA = Codec(
    peft_type="GRALORA",
    configs=(GraLoRAConfig,),
    suffixes=("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"),
    understood="r alpha gralora_k hybrid_r gralora_dropout",
    read=read,
    write=write,
    biased="gralora_only",
    transposed=True,
)
