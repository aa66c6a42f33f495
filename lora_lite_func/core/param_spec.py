"""ParamSpec: what a method says of one of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .random import Draw

__all__ = ["ParamSpec"]


@dataclass(frozen=True)
class ParamSpec:
    """One tensor of a method at a site.

    Attributes:
        shape: its shape.
        init: "zeros", "ones", "kaiming" (uniform in +-1/sqrt(n), n the last dimension), or a draw
            (shape, generator) -> float32 CPU tensor, by that torch.Generator alone.
        trainable: False for a tensor that is part of the adapter but never learned.
        dtype: None is the adapter's dtype; torch.float32 means "float32 at least" (for gates,
            angles, magnitudes); an integer dtype is taken as it is.
        rank_axis: the axis that counts directions, where one more direction of zeros changes
            nothing: such tensors of different ranks stack.
        group: which sites have one tensor in common here: those whose specs give this name the same
            group, in which shapes are equal. A site needs a tensor of its own, too. In a
            stack of weights, one for each expert, the experts share it too.
    """

    shape: tuple[int, ...]
    init: Literal["zeros", "ones", "kaiming"] | Draw = "zeros"
    trainable: bool = True
    dtype: torch.dtype | None = None
    rank_axis: int | None = None
    group: str | None = None
