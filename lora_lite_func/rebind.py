"""References to a module from elsewhere than its parent (a bound forward, a list of modules), turned to the module's copy."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["BINDABLE", "PLAIN", "REFERENCES", "rebound", "refers"]

REFERENCES = (nn.Module, types.MethodType, functools.partial, types.FunctionType, list, tuple, dict)
"""What an attribute may refer to a module through."""

PLAIN = frozenset({str, int, float, bool, type(None)})
"""Types that are common among attributes and never refer to a module."""

BINDABLE = (types.MethodType, functools.partial, types.FunctionType)
_MANY = 256  # a longer list is data, not a list of modules
_DEEP = 8


def refers(value: Any, depth: int = 0) -> bool:
    """Whether `value` may lead to a module: cheap, may say yes for nothing, never no for something."""
    kind = type(value)  # isinstance would ask `__class__` of config objects, slowly
    if not issubclass(kind, (list, tuple, dict)):
        return issubclass(kind, REFERENCES)
    if depth > _DEEP or len(value) > _MANY:
        return False
    items = value.values() if isinstance(value, dict) else value
    if PLAIN.issuperset(map(type, items)):
        return False
    return any(refers(v, depth + 1) for v in items)


def rebound(value: Any, copies: Mapping[int, nn.Module], depth: int) -> Any:
    """`value` with every reference to an original module replaced by its copy; `value` itself if there is none."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if depth > _DEEP or not issubclass(type(value), REFERENCES):
        return value
    if isinstance(value, types.MethodType):
        owner = rebound(value.__self__, copies, depth + 1)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords, value.__dict__)
        func, args, keywords, extra = (rebound(part, copies, depth + 1) for part in parts)
        if func is parts[0] and args is parts[1] and keywords is parts[2]:
            return value
        made = functools.partial(func, *args, **keywords)
        made.__dict__.update(extra)
        return made
    if isinstance(value, types.FunctionType):
        return _rebound_function(value, copies, depth)
    return _rebound_items(value, copies, depth)


def _rebound_items(value: Any, copies: Mapping[int, nn.Module], depth: int) -> Any:
    if len(value) > _MANY:
        return value
    if isinstance(value, dict):
        new = {k: rebound(v, copies, depth + 1) for k, v in value.items()}
        return value if all(new[k] is v for k, v in value.items()) else type(value)(new)
    items = [rebound(v, copies, depth + 1) for v in value]
    if all(a is b for a, b in zip(items, value, strict=True)):
        return value
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _rebound_function(value: types.FunctionType, copies: Mapping[int, nn.Module], depth: int) -> Any:
    """A function whose closure or defaults refer to modules, around the copies."""
    cells = value.__closure__ or ()
    contents = []
    for cell in cells:
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # a cell that isn't filled yet
            return value
    new = [rebound(c, copies, depth + 1) for c in contents]
    defaults = rebound(value.__defaults__, copies, depth + 1)
    if all(a is b for a, b in zip(new, contents, strict=True)) and defaults is value.__defaults__:
        return value
    fresh = tuple(old if a is b else types.CellType(a) for a, b, old in zip(new, contents, cells, strict=True))
    made = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, fresh)
    made.__kwdefaults__ = value.__kwdefaults__
    made.__dict__.update(value.__dict__)
    return made
