"""What refers to modules of the original tree and can't be turned to their copies.

These are objects whose inside isn't known (an iterator, a generator), and what code reads by itself
(see code_reads.py). Both would call the original module, without its adapter.
"""

from __future__ import annotations

import contextvars
import functools
import gc
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .references import PLAIN, Role, refers, role_of

__all__ = ["leads", "leads_by_type", "modules_in"]

_STEPS = 6
_MOST = 2_000
_NOT_INTO = (type, types.ModuleType, types.FunctionType, types.CodeType, types.FrameType, Tensor)
_DESCRIPTORS = (staticmethod, classmethod, property, functools.cached_property)


def modules_in(value: Any, copies: Mapping[int, Any]) -> Iterator[nn.Module]:
    """The first original module that an object leads to, at most 6 steps deep.

    The garbage collector is asked what each object refers to.
    """
    if isinstance(value, contextvars.ContextVar):
        value = value.get(None)
    seen, layer = {id(value)}, [value]
    for _ in range(_STEPS):
        for item in layer:
            if isinstance(item, nn.Module) and id(item) in copies:
                yield item
                return
        found = [item for held in layer for item in gc.get_referents(held)]
        found += [item() for item in found if isinstance(item, weakref.ReferenceType)]
        kept = {id(item): item for item in found if not isinstance(item, _NOT_INTO)}
        layer = [item for key, item in kept.items() if key not in seen][:_MOST]
        seen.update(kept)


def leads(value: Any) -> bool:
    """Whether what code reads may lead to a module."""
    return leads_by_type(value) and (role_of(type(value)) == Role.OPAQUE or refers(value))


def leads_by_type(value: Any) -> bool:
    """Whether such a value may ever lead to a module.

    Functions and classes don't: what they read are places of their own.
    """
    if type(value) in PLAIN or isinstance(value, (*_NOT_INTO, *_DESCRIPTORS)):
        return isinstance(value, nn.Parameter)
    return role_of(type(value)) != Role.DATA
