"""Values of known types that hold others, with what they hold turned to copies.

Each function takes `turned`, which gives an object's copy, or the object itself where nothing in it
leads to an original module, and gives the value itself where nothing in it has a copy.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = [
    "turned_built_in_method",
    "turned_cache",
    "turned_cell",
    "turned_method",
    "turned_partial",
    "turned_proxy",
]

Turned: TypeAlias = Callable[[Any], Any]


# ---------------------------------------------------------------------------------------- callables
def turned_method(value: types.MethodType, turned: Turned) -> Any:
    """A bound method, with its object and its function turned."""
    owner, function = turned(value.__self__), turned(value.__func__)
    if owner is value.__self__ and function is value.__func__:
        return value
    return types.MethodType(function, owner)


def turned_built_in_method(value: Any, turned: Turned) -> Any:
    """A method of a built-in type, such as `held.append`, of the turned object."""
    owner = turned(value.__self__)
    return value if owner is value.__self__ else getattr(owner, value.__name__)


def turned_partial(value: Any, turned: Turned) -> Any:
    """A functools.partial, with its function and arguments turned."""
    parts = (value.func, value.args, value.keywords)
    function, args, keywords = new = tuple(turned(part) for part in parts)
    if all(a is b for a, b in zip(new, parts, strict=True)):
        return value
    made = type(value)(function, *args, **keywords)
    made.__dict__.update(turned(value.__dict__))
    return made


def turned_cache(value: Any, turned: Turned) -> Any:
    """A functools.lru_cache around the turned function; it starts empty."""
    inner = turned(value.__wrapped__)
    if inner is value.__wrapped__:
        return value
    return functools.lru_cache(**value.cache_parameters())(inner)


def turned_cell(cell: types.CellType, turned: Turned) -> types.CellType:
    """A cell of a closure, with what it holds turned."""
    try:
        content = cell.cell_contents
    except ValueError:
        # The cell isn't filled yet.
        return cell
    new = turned(content)
    return cell if new is content else types.CellType(new)


def turned_proxy(value: Any, turned: Turned) -> Any:
    """A weakref.proxy of the turned object; one whose object is gone stays."""
    try:
        target = value.__init__.__self__
    except ReferenceError:
        return value
    owner = turned(target)
    return value if owner is target else weakref.proxy(owner)
