"""PEFT's BOFT: butterfly products of rotations of the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, short_repr
from ....variants import (
    BOFTConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config

__all__ = ["BOFT"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read boft_R (m, n, b, b) and boft_s (d_out, 1). Only the skew part of boft_R counts, and it
    turns the other way than ours.

    Raises:
        CheckpointError: boft_R has another shape.
        ModelNeededError: no model was given.
    """
    entry.known("BOFT acts on inputs")
    R = held["boft_R"]
    if R.ndim != 4 or R.shape[-1] != R.shape[-2]:
        raise CheckpointError(
            f"{short_repr(entry.path)}: boft_R: expected (m, n, b, b), found {tuple(R.shape)}"
        )
    i, j = torch.triu_indices(R.shape[-1], R.shape[-1], 1)
    skew = 0.5 * (R - R.mT)
    fields = {"block_size": R.shape[-1], "m": R.shape[0]}
    return [
        Part(
            BOFTConfig,
            {"lora_boft_q": -skew[..., i, j], "lora_boft_s": held["boft_s"].flatten()},
            fields,
        )
    ]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write boft_R (m, n, b, b), and boft_s as (d_out, 1), or (1, d_out) for a convolution.

    Raises:
        UnsupportedError: the adapters differ in block size or in the number of butterfly factors.
    """
    said = of_config(adapters, "block_size", "m", method="BOFT")
    b, tensors = said["block_size"], {}
    for a in adapters:
        for path, held in a.items():
            q = held["lora_boft_q"]
            R = torch.zeros(*q.shape[:-1], b, b, dtype=q.dtype, device=q.device)
            i, j = torch.triu_indices(b, b, 1)
            R[..., i, j] = -q
            s = held["lora_boft_s"]
            tensors[path] = {
                "boft_R": R - R.mT,
                "boft_s": s[None] if a.sites[path].kind == "conv" else s[:, None],
            }
    return Written(
        {"boft_block_size": b, "boft_block_num": 0, "boft_n_butterfly_factor": said["m"]}, tensors
    )


BOFT = Codec(
    peft_type="BOFT",
    configs=(BOFTConfig,),
    suffixes=("boft_R", "boft_s"),
    understood="boft_block_size boft_block_num boft_n_butterfly_factor",
    ignored="boft_dropout",
    read=read,
    write=write,
    kinds="linear conv2d",
    biased="boft_only",
    undilated=True,
)
