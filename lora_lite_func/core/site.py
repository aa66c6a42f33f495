"""Site: a place that is adapted, as static data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
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
        d_out: rows of the weight (output features).
        bias: whether the frozen layer has a bias.
        kind: what sort of place, a row of the table in kinds.py: "linear", "conv", "embedding",
            "norm", "parameter", "vector", "module", "call", "cache",
            "attention".
        r: the rank here.
        alpha: the strength here.
        scaling: the scale that follows from r and alpha (alpha / r unless the method says
            otherwise).
        num_experts: how many such weights are stacked in one tensor (experts), each with tensors of
            its own; 0 where there is just the one.
        transposed: the tensor is stored (d_in, d_out).
        plus_one: the layer uses 1 + the stored weight.
        scale_tensor: `scaling` as a 0-dim tensor.
        scale: `scaling` as phases should use it: a Python float in eager mode, where it costs
            nothing; a tensor where it is data, as for a member of a mixed stack, and under
            torch.compile, so that a graph compiled for one strength serves every other.
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
    scale_tensor: Tensor | None = field(default=None, compare=False, repr=False)
    scale: float | Tensor = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", self.scaling)

    @property
    def factor(self) -> float:
        """What versions before 0.2.0 called `scaling`."""
        return self.scaling

    @property
    def stack(self) -> int:
        """What versions before 0.2.0 called `num_experts`."""
        return self.num_experts

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a pickle, also of one from 0.1.0, which had other names."""
        known = {_OLD_NAMES.get(name, name): value for name, value in state.items()}
        known.setdefault("scale", known["scaling"])
        self.__dict__.update({field.name: known[field.name] for field in fields(Site)})

    def scaled(self, scale: Tensor) -> Site:
        """The site with a tensor for its scale."""
        return self.having(scale=scale)

    def having(self, **fields: Any) -> Site:
        """What dataclasses.replace gives, without asking each field."""
        made = object.__new__(Site)
        if torch.compiler.is_dynamo_compiling():  # not every torch compiles an update of a __dict__
            for name in _FIELDS:
                value = fields[name] if name in fields else self.__dict__[name]
                object.__setattr__(made, name, value)
        else:
            made.__dict__.update(self.__dict__, **fields)
        if "scaling" in fields:
            made.__dict__["scale"] = fields["scaling"]
        return made


_FIELDS = tuple(field.name for field in fields(Site))
_OLD_NAMES = {"factor": "scaling", "stack": "num_experts", "twin": "scale_tensor"}
