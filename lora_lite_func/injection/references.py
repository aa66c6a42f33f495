"""Which attributes may refer to modules.

This is asked of each attribute in each call, so it has to be cheap.
"""

from __future__ import annotations

import array
import collections
import enum
import functools
import sys
import types
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.torch_internals import HOOK_WRAPPERS, TRACES_IDS, at_trace_time, copy_attributes
from ..core.weak_memo import WeakMemo

__all__ = [
    "BINDABLE",
    "PLAIN",
    "WEAK",
    "Role",
    "all_plain",
    "attributes_of_object",
    "has_state",
    "holds_numbers",
    "is_users",
    "refers",
    "role_of",
    "shallow_copy",
    "slots",
]

PLAIN = (str, int, float, bool, type(None))
"""Types that are common among attributes and never refer to a module."""

_PLAIN = frozenset(PLAIN)


def all_plain(values: Iterable[Any]) -> bool:
    """Whether all values are of plain types."""
    if torch.compiler.is_dynamo_compiling():
        return all(type(value) in PLAIN for value in values)
    # Outside a traced call this is several times as fast.
    return _PLAIN.issuperset(map(type, values))


BINDABLE = (types.MethodType, functools.partial, types.FunctionType)
"""Types of callables that are turned to copies when they are an instance's own `forward`."""

_CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque)
_MADE_IN_PYTHON = (collections.UserDict, collections.UserList, collections.ChainMap)
"""The standard library's containers that are plain objects: what is in them is an attribute."""

WEAK: tuple[Any, ...] = (
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
    weakref.WeakSet,
)
"""Containers that keep nothing alive."""

_WRAPPERS = (types.MappingProxyType, *WEAK)
_POINTERS = (
    nn.Module,
    nn.Parameter,
    types.MethodType,
    types.BuiltinMethodType,
    functools.partial,
    types.FunctionType,
    weakref.ReferenceType,
    weakref.ProxyType,
    weakref.CallableProxyType,
    type(functools.lru_cache(len)),
)
_OPAQUE_MODULES = frozenset(
    {
        "_contextvars",
        "_functools",
        "_operator",
        "_queue",
        "_thread",
        "_threading_local",
        "asyncio",
        "builtins",
        "concurrent",
        "contextlib",
        "contextvars",
        "functools",
        "itertools",
        "operator",
        "queue",
        "threading",
        "types",
        "weakref",
    }
)
"""Modules of the standard library with classes whose objects may hold anything: iterators,
generators, `operator.methodcaller`, `threading.local` ...
"""

_LIBRARIES = frozenset(
    {"torch", "transformers", "diffusers", "accelerate", "numpy", "lora_lite_func"}
)
_DATA = (
    type,
    complex,
    bytes,
    bytearray,
    range,
    slice,
    types.ModuleType,
    types.GenericAlias,
    Tensor,
    enum.Enum,
)


class Role:
    """How objects of a class may lead to modules.

    The roles are strings, because torch.compile can compare those.
    """

    DATA = "data"
    CONTAINER = "container"
    WRAPPER = "wrapper"
    POINTER = "pointer"
    OBJECT = "object"
    OPAQUE = "opaque"


def _role(cls: type) -> str:
    if issubclass(cls, _CONTAINERS):
        return Role.CONTAINER
    if issubclass(cls, _POINTERS):
        return Role.POINTER
    if issubclass(cls, _WRAPPERS):
        return Role.WRAPPER
    if issubclass(cls, _DATA) or _MEMORY(cls):
        return Role.DATA
    if issubclass(cls, _MADE_IN_PYTHON):
        return Role.OBJECT
    if cls in (types.SimpleNamespace, *HOOK_WRAPPERS):
        return Role.OBJECT
    if not is_users(cls.__module__):
        return Role.OPAQUE if cls.__module__.partition(".")[0] in _OPAQUE_MODULES else Role.DATA
    made_in_python = all(
        base.__new__ is object.__new__ or isinstance(base.__new__, types.FunctionType)
        for base in cls.__mro__
    )
    # The copy of an object with a finaliser would be finalised, too.
    return Role.OBJECT if made_in_python and not hasattr(cls, "__del__") else Role.OPAQUE


def is_users(module_name: str) -> bool:
    """Whether what a Python module defines is the user's.

    It isn't if the Python module is Python's own, or belongs to one of the libraries that hold no
    modules out of sight.
    """
    package = module_name.partition(".")[0]
    known = package in sys.stdlib_module_names or package in _LIBRARIES
    return package == "__main__" or not known


def _is_memory(cls: type) -> bool:
    if issubclass(cls, (Tensor, bytearray, array.array)):
        return True
    # numpy needn't be there
    return any(base.__module__ == "numpy" and base.__name__ == "ndarray" for base in cls.__mro__)


_MEMORY = WeakMemo(_is_memory)


def holds_numbers(value: Any) -> bool:
    """Whether it is a tensor or an array, which may be written on in place. A compiler takes arrays
    for tensors of its own.
    """
    if torch.compiler.is_dynamo_compiling():
        return isinstance(value, Tensor)
    return _MEMORY(type(value))


_ROLES = WeakMemo(_role)


@at_trace_time
def role_of(cls: type) -> str:
    """How objects of a class may lead to modules."""
    return _ROLES(cls)


def refers(value: Any, seen: set[int] | None = None) -> bool:
    """Whether `value` may lead to a module.

    It may say yes for nothing, but says no only for what holds no module.
    """
    role = role_of(type(value))
    if role == Role.DATA:
        return False
    if role == Role.POINTER:
        return type(value) is not types.BuiltinMethodType or _has_owner(value)
    if role != Role.CONTAINER and role != Role.OBJECT:
        return True
    held: Any = value
    if role == Role.OBJECT:
        held = attributes_of_object(value).values()
    elif isinstance(value, dict):
        held = value.values()
        if not all_plain(value) and any(isinstance(k, nn.Module) for k in value):
            return True
    if all_plain(held):
        return False
    seen = set() if seen is None else seen
    if TRACES_IDS or not torch.compiler.is_dynamo_compiling():
        if id(value) in seen:
            return False
        seen.add(id(value))
    return any(type(item) not in PLAIN and refers(item, seen) for item in held)


def _has_owner(value: Any) -> bool:
    """Whether a built-in method is bound to an object: `{...}.get` is, `math.sqrt` isn't."""
    return not isinstance(value.__self__, (types.ModuleType, type, type(None), str, bytes))


def attributes_of_object(value: Any) -> dict[str, Any]:
    """An object's attributes, including those in slots."""
    held = getattr(value, "__dict__", {})
    kept = slots(type(value))
    if not kept:
        return held
    return {**held, **{name: getattr(value, name) for name in kept if hasattr(value, name)}}


def has_state(value: Any) -> bool:
    """Whether something may be written on an object of a user's class.

    Nothing is written on a frozen record of plain values or on an object without attributes, and
    one that says how it is copied may be the only one of its kind.
    """
    cls = type(value)
    copies_itself = any(hasattr(cls, name) for name in ("__copy__", "__deepcopy__"))
    if copies_itself and not issubclass(cls, _MADE_IN_PYTHON):
        return False
    held = attributes_of_object(value)
    parameters = getattr(cls, "__dataclass_params__", None)
    frozen = parameters is not None and parameters.frozen
    return len(held) > 0 and not (frozen and all_plain(held.values()))


# ------------------------------------------------------------------------------------------- slots
def _slots(cls: type) -> tuple[str, ...]:
    found = []
    for base in cls.__mro__:
        names = base.__dict__.get("__slots__", ()) if base.__module__ != "builtins" else ()
        for name in (names,) if isinstance(names, str) else names:
            mangled = name.startswith("__") and not name.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{name}" if mangled else name)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


_SLOTS = WeakMemo(_slots)
_SIZE = nn.Module.__basicsize__


@at_trace_time
def slots(cls: type) -> tuple[str, ...]:
    """The attributes that a class keeps in slots."""
    if cls.__basicsize__ == _SIZE and issubclass(cls, nn.Module):
        return ()
    return _SLOTS(cls)


def shallow_copy(module: nn.Module, cls: type[nn.Module]) -> Any:
    """A new object of class `cls` with the very attributes of a module.

    Its dicts of tensors and children are also the module's own.
    """
    made = object.__new__(cls)
    copy_attributes(module, made)
    for name in slots(cls):
        if hasattr(module, name):
            object.__setattr__(made, name, getattr(module, name))
    return made
