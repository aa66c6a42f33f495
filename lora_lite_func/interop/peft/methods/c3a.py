"""PEFT's C3A: circulant blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....variants import (
    C3AConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import patterned
from .tensor_names import same

__all__ = ["C3A"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read c3a_kernel (d_out / b, d_in / b, b), where b is the size of the circulant blocks."""
    w = held["c3a_kernel"]
    return [Part(C3AConfig, {"lora_w": w}, {"block_size": w.shape[-1]})]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write c3a_kernel (d_out / b, d_in / b, b), with a pattern for sites of another block size.

    Raises:
        UnsupportedError: PEFT's patterns can't tell the sites with different block sizes apart.
    """
    blocks = {path: a.config.block_size for a in adapters for path in a}  # type: ignore[attr-defined]
    common, rest = patterned(blocks, "C3A's block_size_pattern")
    return Written(
        {"block_size": common, "block_size_pattern": rest}, same(adapters, lora_w="c3a_kernel")
    )


C3A = Codec(
    peft_type="C3A",
    configs=(C3AConfig,),
    suffixes=("c3a_kernel",),
    understood="block_size block_size_pattern",
    read=read,
    write=write,
    sizes=lambda path, held: (
        (w := held["c3a_kernel"]).shape[1] * w.shape[2],
        w.shape[0] * w.shape[2],
    ),
    biased="c3a_only",
)
