"""Arguments of public functions, checked where they come in: what isn't meant is refused there, and
not by the tensor that is made of it later.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .errors import ConfigError, short_repr

__all__ = ["flag", "function", "items", "number", "texts", "whole"]


def flag(value: Any, where: str) -> bool:
    """A bool; numbers, texts and None aren't.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, bool) or type(value).__name__ == "bool_":  # numpy's
        return bool(value)
    raise ConfigError(f"{where}: expected True or False, found {short_repr(value)}")


def function(value: Any, where: str) -> Any:
    """A callable.

    Raises:
        ConfigError: anything else.
    """
    if callable(value):
        return value
    raise ConfigError(f"{where}: expected a function, found {short_repr(value)}")


def whole(value: Any, where: str, *, least: int | None = None, most: int | None = None) -> int:
    """An int of Python's or numpy's, of a range.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise ConfigError(f"{where}: expected int, found {short_repr(value)}")
    try:
        made = operator.index(value)
    except TypeError:  # numpy's arrays have an __index__ that refuses
        raise ConfigError(f"{where}: expected int, found {short_repr(value)}") from None
    if (least is not None and made < least) or (most is not None and made > most):
        upper = "" if most is None else f", and at most {most}"
        raise ConfigError(f"{where}: expected at least {least}{upper}, found {short_repr(made)}")
    return made


def number(value: Any, where: str) -> float:
    """A finite number of Python's or numpy's.

    Raises:
        ConfigError: anything else.
    """
    try:
        made = math.nan if isinstance(value, (bool, str, bytes, Tensor)) else float(value)
    except (TypeError, ValueError, OverflowError):
        made = math.nan
    if not math.isfinite(made):
        raise ConfigError(f"{where}: expected a finite number, found {short_repr(value)}")
    return made


def items(value: Any, where: str, what: str) -> list[Any]:
    """The items of a sequence or an iterator; a text or a mapping is none.

    Raises:
        ConfigError: anything else.
    """
    odd = isinstance(value, (str, bytes, Tensor)) or hasattr(value, "keys")
    if odd or not isinstance(value, Iterable):
        raise ConfigError(f"{where}: expected a sequence of {what}, found {short_repr(value)}")
    return list(value)


def texts(value: str | Iterable[str], where: str) -> tuple[str, ...]:
    """Texts, of which one may stand alone.

    Raises:
        ConfigError: anything else.
    """
    found = (value,) if isinstance(value, str) else tuple(items(value, where, "texts"))
    for text in found:
        if not isinstance(text, str):
            raise ConfigError(f"{where}: expected texts, found {short_repr(text)}")
    return found
