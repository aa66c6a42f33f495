"""Tensors under our names and under PEFT's, where the name is all that differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ....core.adapter import Adapter
from ....variants import BitFitConfig

__all__ = ["columns_rows", "renamed", "same", "shifts_of"]


def renamed(held: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return {our name: tensor} of the tensors that are there. `names` maps our names to theirs."""
    return {ours: held[theirs] for ours, theirs in names.items() if theirs in held}


def same(adapters: Sequence[Adapter], **names: str) -> dict[str, dict[str, Tensor]]:
    """Return {path: {PEFT's suffix: tensor}} of the tensors that are there. Names are given as
    ours=theirs.
    """
    return {
        path: {theirs: held[ours] for ours, theirs in names.items() if ours in held}
        for a in adapters
        for path, held in a.items()
    }


def columns_rows(a: str, b: str) -> Callable[[str, Mapping[str, Tensor]], tuple[int, int]]:
    """Return a `Codec.sizes` for a pair that is stored as a (r, d_in) and b (d_out, r)."""
    return lambda path, held: (held[a].shape[-1], held[b].shape[0])


def shifts_of(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Return {path: shift}: what the BitFits among these adapters add to the output of each
    layer.
    """
    found: dict[str, Tensor] = {}
    for a in adapters:
        if isinstance(a.config, BitFitConfig):
            for path, held in a.items():
                found[path] = found[path] + held["lora_b"] if path in found else held["lora_b"]
    return found
