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

from ..core.torch_internals import at_trace_time

__all__ = ["BINDABLE", "PLAIN", "REFERENCES", "rebound", "refers", "shallow_copy", "slots"]

_CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
REFERENCES = (
    nn.Module,
    types.MethodType,
    functools.partial,
    types.FunctionType,
    weakref.ReferenceType,
    *_PROXIES,
    *_CONTAINERS,
)
"""What an attribute may refer to a module through, besides small objects of the user's own classes.
"""

PLAIN = frozenset({str, int, float, bool, type(None)})
"""Types that are common among attributes and never refer to a module."""

BINDABLE = (types.MethodType, functools.partial, types.FunctionType)
_MANY = 256  # a longer list is data, unless what it begins with refers to a module
_FEW = 16  # an object of more attributes is no holder of modules
_DEEP = 8


def refers(value: Any, depth: int = 0) -> bool:
    """Whether `value` may lead to a module: cheap, may say yes for nothing, no only for what lies
    too deep.
    """
    kind = type(value)  # isinstance would ask `__class__` of config objects, slowly
    if not issubclass(kind, _CONTAINERS):
        return issubclass(kind, REFERENCES) or (
            depth < 3 and _holds(kind) and _any_refers(_attributes(value), _FEW, depth)
        )
    return depth <= _DEEP and _any_refers(value, _MANY, depth)


def _any_refers(value: Any, most: int, depth: int) -> bool:
    items = value.values() if isinstance(value, dict) else value
    if len(value) > most and (most == _FEW or not refers(next(iter(items)), depth + 1)):
        return False
    if items is not value and value and isinstance(next(iter(value)), nn.Module):
        return True
    if PLAIN.issuperset(map(type, items)):
        return False
    return any(refers(v, depth + 1) for v in items)


@at_trace_time
def _holds(kind: type) -> bool:
    """Objects of a class may hold modules: of a user's own class, in Python alone. Libraries'
    configs don't.
    """
    found = _HOLDS.get(kind)
    if found is None:
        found = _HOLDS[kind] = _is_users(kind)
    return found


_HOLDS: dict[type, bool] = {}


def _is_users(kind: type) -> bool:
    if kind is types.SimpleNamespace:
        return True
    home = kind.__module__.partition(".")[0]
    if (
        home in sys.stdlib_module_names or home in _LIBRARIES or hasattr(kind, "__del__")
    ):  # a copy would be finalised, too
        return False
    return all(
        base.__new__ is object.__new__ or isinstance(base.__new__, types.FunctionType)
        for base in kind.__mro__
    )


def _attributes(value: Any) -> dict[str, Any]:
    """An object's attributes, those in slots too."""
    held = getattr(value, "__dict__", {})
    kept = slots(type(value))
    return (
        {**held, **{name: getattr(value, name) for name in kept if hasattr(value, name)}}
        if kept
        else held
    )


_LIBRARIES = frozenset(
    {"torch", "transformers", "diffusers", "accelerate", "numpy", "lora_lite_func"}
)


@at_trace_time
def slots(cls: type) -> tuple[str, ...]:
    """The attributes that a class keeps in slots."""
    if cls.__basicsize__ == _SIZE and issubclass(cls, nn.Module):
        return ()
    if cls not in _SLOTS:
        _SLOTS[cls] = _slots(cls)
    return _SLOTS[cls]


_SIZE = nn.Module.__basicsize__
_SLOTS: dict[type, tuple[str, ...]] = {}


def _slots(cls: type) -> tuple[str, ...]:
    found = [
        (base.__name__.lstrip("_"), base.__dict__.get("__slots__", ()))
        for base in cls.__mro__
        if base.__module__ != "builtins"
    ]
    names = [
        (home, name)
        for home, names in found
        for name in ((names,) if isinstance(names, str) else names)
    ]
    mangled = [
        f"_{home}{name}" if name.startswith("__") and not name.endswith("__") else name
        for home, name in names
    ]
    return tuple(name for name in mangled if name not in ("__dict__", "__weakref__"))


def shallow_copy(module: nn.Module, cls: type[nn.Module]) -> Any:
    """A new object of class `cls` with the very attributes of a module, its dicts of tensors and
    children among them.
    """
    made = object.__new__(cls)
    made.__dict__.update(module.__dict__)
    for name in slots(cls):
        if hasattr(module, name):
            object.__setattr__(made, name, getattr(module, name))
    return made


def rebound(value: Any, copies: dict[int, Any], depth: int) -> Any:
    """`value` with every reference to an original module replaced by its copy; `value` itself if
    there is none.
    """
    if issubclass(type(value), _PROXIES):
        return _rebound_proxy(value, copies)
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if depth > _DEEP:
        return value
    if not issubclass(type(value), REFERENCES):
        return (
            _rebound_object(value, copies, depth)
            if _holds(type(value)) and len(_attributes(value)) <= _FEW
            else value
        )
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
        new = [(copies.get(id(k), k), rebound(v, copies, depth + 1)) for k, v in value.items()]
        if all(a is k and b is v for (a, b), (k, v) in zip(new, value.items(), strict=True)):
            return value
        if type(value) is dict:
            return dict(new)
        made = copy.copy(value)  # a subclass may need more than its items
        made.clear()
        made.update(new)
        return made
    items = [rebound(v, copies, depth + 1) for v in value]
    if all(a is b for a, b in zip(items, value, strict=True)):
        return value
    if isinstance(value, collections.deque):
        return collections.deque(items, value.maxlen)
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _rebound_proxy(value: Any, copies: dict[int, Any]) -> Any:
    """A weak proxy of a module as one of its copy."""
    try:
        target = value.__init__.__self__
    except ReferenceError:
        return value
    owner = copies.get(id(target), target)
    return value if owner is target else weakref.proxy(owner)


def _rebound_object(value: Any, copies: dict[int, Any], depth: int) -> Any:
    """An object of a user's class whose attributes refer to modules, as a copy around theirs; the
    same copy wherever it is held.
    """
    if id(value) in copies:
        return copies[id(value)]
    kind: Any = type(value)
    new_object = kind.__new__ if kind is types.SimpleNamespace else object.__new__
    made = copies[id(value)] = new_object(kind)  # noted first: it may refer to itself
    attributes = _attributes(value)
    new = {name: rebound(v, copies, depth + 1) for name, v in attributes.items()}
    for name, v in new.items():
        object.__setattr__(made, name, v)
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
    fresh = tuple(
        old if a is b else types.CellType(a) for a, b, old in zip(new, contents, cells, strict=True)
    )
    made = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, fresh)
    made.__kwdefaults__ = value.__kwdefaults__
    made.__dict__.update(value.__dict__)
    return made
