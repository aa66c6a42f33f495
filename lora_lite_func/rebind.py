"""References to a module from elsewhere than its parent (a bound forward, a list of modules), turned to the module's copy."""

from __future__ import annotations

import collections
import copy
import functools
import sys
import types
import weakref
from typing import Any

from torch import nn

from .layers import at_trace_time

__all__ = ["BINDABLE", "PLAIN", "REFERENCES", "rebound", "refers", "slots", "twin"]

_CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque)
REFERENCES = (nn.Module, types.MethodType, functools.partial, types.FunctionType, weakref.ReferenceType, *_CONTAINERS)
"""What an attribute may refer to a module through, besides small objects of the user's own classes."""

PLAIN = frozenset({str, int, float, bool, type(None)})
"""Types that are common among attributes and never refer to a module."""

BINDABLE = (types.MethodType, functools.partial, types.FunctionType)
_MANY = 256  # a longer list is data, unless it begins with a module; an object of more attributes than _FEW is no holder of modules
_FEW = 16
_DEEP = 8


def refers(value: Any, depth: int = 0) -> bool:
    """Whether `value` may lead to a module: cheap, may say yes for nothing, no only for what lies too deep."""
    kind = type(value)  # isinstance would ask `__class__` of config objects, slowly
    if not issubclass(kind, _CONTAINERS):
        return issubclass(kind, REFERENCES) or (depth < 3 and _holds(kind) and _any_refers(vars(value), _FEW, depth))
    return depth <= _DEEP and _any_refers(value, _MANY, depth)


def _any_refers(value: Any, most: int, depth: int) -> bool:
    items = value.values() if isinstance(value, dict) else value
    if len(value) > most and not isinstance(next(iter(items)), nn.Module):
        return False
    if PLAIN.issuperset(map(type, items)):
        return False
    return any(refers(v, depth + 1) for v in items)


@at_trace_time
def _holds(kind: type) -> bool:
    """Objects of a class may hold modules: of a user's own class, with attributes. Libraries' configs don't."""
    found = _HOLDS.get(kind)
    if found is None:
        found = _HOLDS[kind] = _is_users(kind)
    return found


_HOLDS: dict[type, bool] = {}


def _is_users(kind: type) -> bool:
    if kind is types.SimpleNamespace:
        return True
    home = kind.__module__.partition(".")[0]
    return home not in sys.stdlib_module_names and home not in _LIBRARIES and kind.__dictoffset__ != 0 and kind.__new__ is object.__new__


_LIBRARIES = frozenset({"torch", "transformers", "diffusers", "accelerate", "numpy", "lora_lite_func"})


@at_trace_time
def slots(cls: type) -> tuple[str, ...]:
    """The attributes that a class keeps in slots."""
    if cls.__basicsize__ == _SIZE:
        return ()
    found = [getattr(base, "__slots__", ()) for base in cls.__mro__ if base.__module__ != "builtins"]
    names = [name for names in found for name in ((names,) if isinstance(names, str) else names)]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


_SIZE = nn.Module.__basicsize__


def twin(module: nn.Module, cls: type[nn.Module]) -> Any:
    """A new object of class `cls` with the very attributes of a module, its dicts of tensors and children among them."""
    made = object.__new__(cls)
    made.__dict__.update(module.__dict__)
    for name in slots(cls):
        if hasattr(module, name):
            object.__setattr__(made, name, getattr(module, name))
    return made


def rebound(value: Any, copies: dict[int, Any], depth: int) -> Any:
    """`value` with every reference to an original module replaced by its copy; `value` itself if there is none."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if depth > _DEEP:
        return value
    if not issubclass(type(value), REFERENCES):
        return _rebound_object(value, copies, depth) if _holds(type(value)) and len(vars(value)) <= _FEW else value
    if isinstance(value, weakref.ReferenceType):
        target = value()
        owner = rebound(target, copies, depth + 1) if isinstance(target, nn.Module) else target
        return value if owner is target else weakref.ref(owner)
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


def _rebound_items(value: Any, copies: dict[int, Any], depth: int) -> Any:
    if not _any_refers(value, _MANY, 0):
        return value
    if isinstance(value, dict):
        new = {k: rebound(v, copies, depth + 1) for k, v in value.items()}
        if all(new[k] is v for k, v in value.items()):
            return value
        if type(value) is dict:
            return new
        made = copy.copy(value)  # a subclass may need more than its items
        made.update(new)
        return made
    items = [rebound(v, copies, depth + 1) for v in value]
    if all(a is b for a, b in zip(items, value, strict=True)):
        return value
    if isinstance(value, collections.deque):
        return collections.deque(items, value.maxlen)
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _rebound_object(value: Any, copies: dict[int, Any], depth: int) -> Any:
    """An object of a user's class whose attributes refer to modules, as a copy around theirs; the same copy wherever it is held."""
    if id(value) in copies:
        return copies[id(value)]
    kind: Any = type(value)
    made = copies[id(value)] = kind.__new__(kind)  # noted first: it may refer to itself
    attributes = vars(value)
    new = {name: rebound(v, copies, depth + 1) for name, v in attributes.items()}
    made.__dict__.update(new)
    if all(new[name] is v or v is value for name, v in attributes.items()):
        copies[id(value)] = value
        return value
    return made


def _rebound_function(value: types.FunctionType, copies: dict[int, Any], depth: int) -> Any:
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
