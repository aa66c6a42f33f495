"""Site: a place that is adapted, as static data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Params", "Site"]

Params = Mapping[str, Tensor]
"""The tensors of one site: {lora_name: tensor}."""


@dataclass(frozen=True)
class Site:
    """A place that is adapted: static data, known without the model.

    Attributes:
        path: full module path; "" is the model itself. A bare parameter's full name.
        d_in: columns of the weight as methods see it (input features; all a kernel sums over; 1 for
            a norm).
        d_out: its rows (output features).
        bias: whether the frozen layer has a bias.
        kind: what sort of place, a row of the table in kinds.py: "linear", "conv", "embedding",
            "norm", "parameter", "vector", "module".
        r: the rank here.
        alpha: the strength here.
        scaling: the scale that follows from r and alpha (alpha / r unless the method says
            otherwise).
        num_experts: how many such weights are stacked in one tensor (experts), each with tensors of
            its own; 0 where there is just the one.
        transposed: the tensor is stored (d_in, d_out).
        plus_one: the layer uses 1 + the stored weight.
    """

    path: str
    d_in: int
    d_out: int
    bias: bool = False
    kind: str = "linear"
    r: int = 8
    alpha: float = 16.0
    scaling: float = 2.0
    num_experts: int = 0
    transposed: bool = False
    plus_one: bool = False
    scale_tensor: Tensor | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def scale(self) -> float | Tensor:
        """`scaling` as phases should use it.

        A Python float in eager mode, where it costs nothing; under torch.compile a 0-dim tensor of
        the same value, so that a graph compiled for one strength serves every other.
        """
        if torch.compiler.is_compiling() and self.scale_tensor is not None:
            return self.scale_tensor
        return self.scaling

    @property
    def factor(self) -> float:
        """What versions before 0.2.0 called `scaling`."""
        return self.scaling

    @property
    def stack(self) -> int:
        """What versions before 0.2.0 called `num_experts`."""
        return self.num_experts

    def scaled(self, scaling: Tensor) -> Site:
        """The site with a scale that is data."""
        return self.having(scaling=scaling, scale_tensor=None)

    def having(self, **fields: Any) -> Site:
        """What dataclasses.replace gives, without asking each field."""
        made = object.__new__(Site)
        made.__dict__.update(self.__dict__, **fields)
        return made
