"""Results of calls with other members, of the class that they had."""

from __future__ import annotations

import collections
import copy
import types
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from ..core.errors import UnsupportedError
from .cloning import clone

__all__ = ["mapping_with", "sequence_with"]


def sequence_with(result: Any, members: Iterable[Any]) -> Any:
    """A tuple or list of the same class with other members."""
    kind = type(result)
    if kind in (tuple, list):
        return kind(members)
    return kind(*members) if hasattr(kind, "_fields") else clone(result, list(members))


def mapping_with(result: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the same class with other items.

    Raises:
        UnsupportedError: the class lets nobody make one.
    """
    kind = type(result)
    if kind is dict:
        return items
    if kind in (collections.OrderedDict, types.MappingProxyType):
        return kind(items)  # type: ignore[call-arg]
    if hasattr(kind, "__dataclass_fields__"):  # a ModelOutput has its items as attributes, too
        return kind(**items)
    if isinstance(result, dict):
        return clone(result, items)
    if not isinstance(result, MutableMapping):
        raise UnsupportedError(
            f"the result of an adapted call is a {kind.__name__}, of which no other can be made; "
            f"return a tensor, a tuple or a dict"
        )
    made = copy.copy(result)
    for name in result:
        del made[name]
    made.update(items)
    return made
