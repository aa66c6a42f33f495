"""PEFT's LoKr: the Kronecker product of two factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import UnsupportedError
from ....variants import (
    LoKrConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, ranks
from .tensor_names import renamed, same

__all__ = ["LOKR"]


_LOKR = {f"lora_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """lokr_w1 (l, m) or its factors, lokr_w2 (k, n) or its: kron(w1, w2) alpha / r, also where both
    are full.
    """
    r = int(reader.at("rank_pattern", entry.path, reader.whole("r", 8)))
    alpha = reader.at("alpha_pattern", entry.path, reader.number("alpha", 8))
    leaves = renamed(held, _LOKR)
    if "lora_w1" in leaves and "lora_w2" in leaves:
        leaves["lora_w1"] = leaves["lora_w1"] * (alpha / r)  # ours has no rank to divide by
    fields = {
        "factor": reader.get("decompose_factor", -1),
        "decompose_both": reader.flag("decompose_both"),
    }
    return [Part(LoKrConfig, leaves, fields, r, alpha)]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """The factors under PEFT's names, two whole ones without our lack of a scale.

    Raises:
        UnsupportedError: sizes of factors that PEFT wouldn't make of its one `decompose_factor`.
    """
    said = of_config(adapters, "factor", "decompose_both", method="LoKr")
    given = next((path for a in adapters for path, _ in a.config.w1_shapes if path in a), None)  # type: ignore[attr-defined]
    if given is not None:
        raise UnsupportedError(
            f"to_peft: {given!r}: PEFT splits every layer by one factor, this W1 has a shape of its "
            f"own (w1_shapes); merge it"
        )
    tensors, (r, alpha) = same(adapters, **_LOKR), ranks(adapters)
    for path, held in tensors.items():
        if "lokr_w1" in held and "lokr_w2" in held:
            if not alpha[path]:
                alpha[path] = float(r[path])
            held["lokr_w1"] = held["lokr_w1"] * (r[path] / alpha[path])
    return Written(
        {"decompose_factor": said["factor"], "decompose_both": said["decompose_both"]},
        tensors,
        {},
        r,
        alpha,
    )


def sizes(path: str, held: Mapping[str, Tensor]) -> tuple[int, int]:
    def shape(name: str) -> tuple[int, int]:
        full = held.get(name)
        if full is not None:
            return int(full.shape[0]), int(full.shape[1])
        return int(held[f"{name}_a"].shape[0]), int(held[f"{name}_b"].shape[1])

    (l, m), (k, n) = shape("lokr_w1"), shape("lokr_w2")  # noqa: E741
    return m * n, l * k


LOKR = Codec(
    sizes=sizes,
    alpha="alpha",
    peft_type="LOKR",
    configs=(LoKrConfig,),
    suffixes=tuple(_LOKR.values()),
    understood="r alpha rank_pattern alpha_pattern decompose_both decompose_factor",
    read=read,
    write=write,
)
