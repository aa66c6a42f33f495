"""What refers to modules of the original tree and can't be turned to their copies.

These are objects whose inside isn't known (an iterator, a generator), and functions that reach a
module by a global name. Both would call the original module, without its adapter.
"""

from __future__ import annotations

import dis
import gc
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.weak_memo import WeakMemo
from .references import PLAIN, Role, is_users, refers, role_of

__all__ = ["calls_of", "global_names", "globals_of", "modules_in"]

_STEPS = 6
_MOST = 2_000
_NOT_INTO = (type, types.ModuleType, types.FunctionType, types.CodeType, types.FrameType, Tensor)


def modules_in(value: Any, copies: Mapping[int, Any]) -> Iterator[nn.Module]:
    """The first original module that an object leads to, at most 6 steps deep.

    The garbage collector is asked what each object refers to.
    """
    seen, layer = {id(value)}, [value]
    for _ in range(_STEPS):
        for item in layer:
            if isinstance(item, nn.Module) and id(item) in copies:
                yield item
                return
        found = [item for held in layer for item in gc.get_referents(held)]
        kept = {id(item): item for item in found if not isinstance(item, _NOT_INTO)}
        layer = [item for key, item in kept.items() if key not in seen][:_MOST]
        seen.update(kept)


# ------------------------------------------------------------------------------------------ globals
def globals_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals that a user's function reads and that may lead to a module, as (name, value)."""
    if not is_users(function.__module__ or ""):
        return
    for name in _READ(function.__code__):
        value = function.__globals__.get(name)
        if _may_lead(value) and refers(value):
            yield name, value


def _may_lead(value: Any) -> bool:
    """Whether a global may lead to modules. A function may only where it is a user's."""
    if isinstance(value, types.FunctionType):
        return is_users(value.__module__ or "")
    return type(value) not in PLAIN and role_of(type(value)) != Role.DATA


def _read(code: types.CodeType) -> frozenset[str]:
    """The globals that a function and the functions inside it read."""
    names = {
        i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    inner = [_read(held) for held in code.co_consts if isinstance(held, types.CodeType)]
    return frozenset(names).union(*inner)


_READ = WeakMemo(_read)


def calls_of(cls: type) -> Iterator[types.FunctionType]:
    """The functions in a class that its calls may reach: by name from `forward`, from what that
    names, and so on. Those of torch are left out.
    """
    left, done = ["forward"], set[str]()
    while left:
        name = left.pop()
        method = inspect.getattr_static(cls, name, None)
        method = getattr(method, "fget", None) or getattr(method, "__func__", method)
        if name in done or not isinstance(method, types.FunctionType):
            continue
        done.add(name)
        if not (method.__module__ or "").startswith("torch."):
            yield method
            left += _NAMES(method.__code__)


def _names(code: types.CodeType) -> frozenset[str]:
    """The attributes and globals that a function and the functions inside it name."""
    inner = [_names(held) for held in code.co_consts if isinstance(held, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


_NAMES = WeakMemo(_names)


def _global_names(cls: type) -> tuple[tuple[dict[str, Any], str], ...]:
    """The globals that the calls of a class read, as (the dict of globals, name)."""
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    for method in calls_of(cls):
        if not is_users(method.__module__ or ""):
            continue
        held = method.__globals__
        for used in _READ(method.__code__):
            if used in held and _may_lead(held[used]):
                found[id(held), used] = (held, used)
    return tuple(found.values())


global_names = WeakMemo(_global_names)
"""The globals by which the calls of a class may reach modules: (the dict of globals, name)."""
