"""ParamSpec: what a method says of one of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .errors import ConfigError, short_repr
from .random import Draw

__all__ = ["ParamSpec", "check_specs"]


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


def check_specs(specs: Any, method: str) -> Mapping[str, ParamSpec]:
    """What a method's `param_specs` gave for a site, if it can be meant.

    Args:
        specs: what it gave.
        method: the method's name, for messages.

    Raises:
        ConfigError: no mapping of names to ParamSpecs, none of the site's own, a name that doesn't
            begin with "lora_", or a field that says something that can't be meant.
    """
    if not isinstance(specs, Mapping) or not all(isinstance(s, ParamSpec) for s in specs.values()):
        raise ConfigError(
            f"{method}.param_specs: expected a mapping of names to ParamSpecs, found "
            f"{short_repr(specs)}"
        )
    if not specs:
        raise ConfigError(f"{method}.param_specs: expected at least one tensor, found {{}}")
    if all(spec.group is not None for spec in specs.values()):
        raise ConfigError(
            f"{method}.param_specs: expected at least one tensor of the site's own, found "
            f"{short_repr(sorted(specs))}"
        )
    for name, spec in specs.items():
        if not isinstance(name, str) or not name.startswith("lora_") or "." in name:
            raise ConfigError(
                f"{method} names a tensor {name!r}; expected a name that begins with "
                f"'lora_', without dots"
            )
        if spec.init not in ("zeros", "ones", "kaiming") and not callable(spec.init):
            raise ConfigError(
                f"{method}: {name} starts as {spec.init!r}; expected 'zeros', 'ones', "
                f"'kaiming' or a draw"
            )
        _check_spec(spec, f"{method}: {name}")
    return specs


def _check_spec(spec: ParamSpec, where: str) -> None:
    shape, dtype, axis = spec.shape, spec.dtype, spec.rank_axis
    if not isinstance(shape, (tuple, list)) or not all(
        isinstance(n, int) and n >= 0 for n in shape
    ):
        raise ConfigError(f"{where} has the shape {short_repr(shape)}; expected a tuple of sizes")
    if axis is not None and not 0 <= axis < len(shape):
        raise ConfigError(
            f"{where} has rank_axis={axis}; expected one of its {len(shape)} axes, counted from 0"
        )
    if spec.group is not None and (not isinstance(spec.group, str) or not spec.group):
        raise ConfigError(
            f"{where} has the group {short_repr(spec.group)}; expected a name, or None for a "
            f"tensor of the site's own"
        )
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{where} is {short_repr(dtype)}; expected a torch.dtype or None")
    if dtype.is_complex:
        raise ConfigError(
            f"{where} is {dtype}; expected a real dtype (a complex tensor is two, or one with a "
            f"last axis of 2)"
        )
    if spec.trainable and not dtype.is_floating_point:
        raise ConfigError(
            f"{where} is {dtype} and trainable; expected a floating dtype, or trainable=False"
        )
