"""PEFT's PEANuT: a low-rank update whose inner factor is a network's view of the weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....variants import PEANuTConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, one_of, ranks, refuse_dropout

__all__ = ["PEANUT"]

_DEEPEST = 32  # the most layers that a file's network may have
_A, _B = "peanut_A.weight", "peanut_B.weight"


def _layer(kind: str, i: int) -> str:
    return f"peanut_{kind}.{i}.weight"


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read peanut_A (r, d_out), peanut_B (d_out, r), and the network's layers, (r, r) each.

    Raises:
        CheckpointError: a layer is missing.
        ModelNeededError: no model was given.
    """
    entry.known("PEANuT has sides of the output alone")
    depth = reader.whole("depth", 0, 0)
    leaves = {"lora_A": held[_A], "lora_B": held[_B]}
    if depth:
        for ours, kind in (("lora_E", "encoders"), ("lora_D", "decoders")):
            leaves[ours] = torch.stack([held[_layer(kind, i)] for i in range(depth)])
    fields = {"depth": depth, "activation": reader.get("act_fn", "relu")}
    return [Part(PEANuTConfig, leaves, fields, held[_A].shape[0], reader.number("scaling", 1.0))]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write peanut_A (r, d_out), peanut_B (d_out, r), and the network's layers.

    Raises:
        UnsupportedError: the sites differ in a setting, or inputs are dropped.
    """
    refuse_dropout(adapters, "PEANuT")
    said = of_config(adapters, "depth", "activation", method="PEANuT")
    every_r, alphas = ranks(adapters)
    r, alpha = one_of(every_r, "PEANuT", "r"), one_of(alphas, "PEANuT", "alpha")
    tensors = {}
    for a in adapters:
        for path, held in a.items():
            tensors[path] = {_A: held["lora_A"], _B: held["lora_B"]}
            for i in range(said["depth"]):
                tensors[path][_layer("encoders", i)] = held["lora_E"][i]
                tensors[path][_layer("decoders", i)] = held["lora_D"][i]
    fields = {"r": r, "scaling": alpha, "depth": said["depth"], "act_fn": said["activation"]}
    return Written(fields, tensors)


PEANUT = Codec(
    peft_type="PEANUT",
    configs=(PEANuTConfig,),
    suffixes=(
        _A,
        _B,
        *(_layer(kind, i) for kind in ("encoders", "decoders") for i in range(_DEEPEST)),
    ),
    understood="r depth scaling act_fn",
    read=read,
    write=write,
)
