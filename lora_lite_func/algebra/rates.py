"""Rates of an optimizer and bounds: one number, one per leaf name, or one per member of a stack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.absent import ABSENT
from ..core.adapter import Adapter, count_members, keys, leaves
from ..core.config import real
from ..core.errors import ConfigError, StructureError, nearest, short_repr
from ..core.torch_internals import first_of
from .alike import every_adapter

__all__ = [
    "Rate",
    "Rates",
    "along_members",
    "check_fit",
    "check_not_negative",
    "check_rates",
    "is_scalar",
    "is_stack",
    "leaf_names",
    "rate_of",
]


Rate = float | Tensor
"""A number, or one per member of a stack (K,)."""


Rates = Rate | Mapping[str, Rate]
"""A rate, or rates by the leaf's name ("default" for the others)."""


_DEFAULT = "default"


def is_scalar(rate: Rate) -> bool:
    """Whether a rate is one number, for every member."""
    return not isinstance(rate, Tensor) or not rate.ndim


def check_rates(value: Any, what: str) -> None:
    """Refuse rates that are negative, or no numbers.

    Raises:
        ConfigError: one is.
    """
    for rate in value.values() if isinstance(value, Mapping) else (value,):
        check_not_negative(rate, what)


def check_not_negative(value: Any, what: str) -> None:
    """Refuse what is negative, or no number.

    Raises:
        ConfigError: it is.
    """
    real(value, what)
    # a tensor's values may be data of a graph
    if isinstance(value, (int, float)) and not value >= 0:
        raise ConfigError(f"{what}: expected a number of at least 0, found {short_repr(value)}")


def rate_of(rates: Rates, name: str) -> Rate:
    """The rate of the leaves of a name."""
    if not isinstance(rates, Mapping):
        return rates
    return rates[name] if name in rates else rates[_DEFAULT]


def check_fit(value: Any, tree: Any, what: str) -> None:
    """Refuse rates that don't fit the adapters: by names, and by members.

    Raises:
        StructureError: a name that no leaf has or that is missing, or a vector of another length.
    """
    adapters = every_adapter(tree, what.partition(":")[0])
    if isinstance(value, Mapping):
        known = {name for a in adapters for name in leaf_names(a)}
        odd = first_of((name for name in value if name not in known and name != _DEFAULT), None)
        if odd is not None:
            raise StructureError(f"{what}: no leaf is named {odd!r}; {nearest(str(odd), known)}")
        missing = sorted(known - value.keys())
        if missing and _DEFAULT not in value:
            raise StructureError(
                f"{what}: expected a rate for {missing[0]}, or one for {_DEFAULT!r}, found rates "
                f"for {', '.join(map(str, value)) or 'nothing'}"
            )
    for rate in value.values() if isinstance(value, Mapping) else (value,):
        if isinstance(rate, Tensor) and rate.ndim:
            for adapter in adapters:
                _per_member(rate, adapter, what)


def _per_member(rate: Tensor, adapter: Adapter, what: str) -> None:
    count = count_members(adapter, what)
    if tuple(rate.shape) != (count,):
        raise StructureError(
            f"{what}: expected one number or {count}, one per member of the stack, found "
            f"shape {tuple(rate.shape)}"
        )


def leaf_names(adapter: Adapter) -> list[str]:
    """The name of each leaf that is there, in order."""
    return [
        name for (_, name), t in zip(keys(adapter), leaves(adapter), strict=True) if t is not ABSENT
    ]


def is_stack(params: Adapter) -> bool:
    """Whether leaves have one axis more than the layout says."""
    for path, specs in params.layout.specs.items():
        for name, leaf in params._data[path].items():
            if isinstance(leaf, Tensor):
                return leaf.ndim > len(specs[name].shape)
    return False


def along_members(value: Tensor, leaf: Tensor) -> Tensor:
    """A tensor () or (K,) in a shape that broadcasts against a leaf (K, ...)."""
    return value.to(leaf.device).view((*value.shape, *[1] * (leaf.ndim - value.ndim)))
