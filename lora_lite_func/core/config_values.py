"""Values of a config: checked, and brought to the type that their field is annotated with."""

from __future__ import annotations

import math
import re
import types
import typing
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch

from .errors import ConfigError, short_repr

__all__ = ["LARGEST", "check_pattern", "check_rank", "coerce"]


LARGEST = 2**31 - 1
"""A rank or a layer's dimension above it is a mistake, or a hostile file's."""


def check_rank(r: int, where: str) -> None:
    """Refuse a rank below 1, or above any layer.

    Raises:
        ConfigError: it is.
    """
    if r < 1:
        raise ConfigError(f"{where}: expected at least 1, found {short_repr(r)}")
    if r > LARGEST:
        raise ConfigError(f"{where}: expected at most {LARGEST}, found {short_repr(r)}")


def check_pattern(pattern: str, where: str) -> None:
    """Refuse what isn't a regular expression.

    Raises:
        ConfigError: it isn't one.
    """
    # only a set of characters can make Python warn
    without_warnings = warnings.catch_warnings() if "[" in pattern else nullcontext()
    try:
        with without_warnings:
            if "[" in pattern:
                warnings.simplefilter("ignore", FutureWarning)
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{where}: {short_repr(pattern)} is not a regular expression: {error}"
        ) from None


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint` says: lists become tuples, dicts pairs, ints floats.

    Raises:
        ConfigError: anything else.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
        raise ConfigError(
            f"{where}: expected one of {', '.join(map(repr, args))}, found {short_repr(value)}"
        )
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return tuple(
            coerce(v, args[0], f"{where}[{i}]") for i, v in enumerate(_items(value, args[0], where))
        )
    if origin is tuple:
        if (
            not isinstance(value, Sequence)
            or isinstance(value, (str, bytes))
            or len(value) != len(args)
        ):
            raise ConfigError(f"{where}: expected {len(args)} values, found {short_repr(value)}")
        return tuple(coerce(v, a, where) for v, a in zip(value, args, strict=True))
    if hint is torch.dtype:
        return _dtype(value, where)
    if hint in (int, float, str, bool):
        kinds = (int, float) if hint is float else hint
        if not isinstance(value, kinds) or (hint is not bool and isinstance(value, bool)):
            raise ConfigError(f"{where}: expected {hint.__name__}, found {short_repr(value)}")
        return _finite(value, where) if hint is float else value
    return value


def _items(value: Any, kind: Any, where: str) -> Iterable[Any]:
    """The items of what stands for a sequence: a string stands for itself alone, a mapping for its
    pairs, a set for its items in a fixed order.
    """
    if isinstance(value, str) and (kind is str or typing.get_origin(kind) is Literal):
        return (value,)
    if isinstance(value, Mapping):
        return tuple(value.items())
    if isinstance(value, (set, frozenset)):
        return sorted(
            value, key=lambda v: (type(v).__name__, v if isinstance(v, (int, str)) else repr(v))
        )
    if not isinstance(value, (Sequence, range)) or isinstance(value, (str, bytes)):
        raise ConfigError(f"{where}: expected a sequence, found {short_repr(value)}")
    return value


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:  # an int beyond the floats
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{where}: expected a finite number, found {short_repr(value)}")
    return number


def _dtype(value: Any, where: str) -> torch.dtype:
    found = value
    if isinstance(value, str):  # looked up by vars, which runs nothing of torch's
        found = vars(torch).get(value.removeprefix("torch."))
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize == 1:
        raise ConfigError(
            f"{where}: expected a floating torch.dtype, found {short_repr(value)}; 16 bits at least"
        )
    return found
