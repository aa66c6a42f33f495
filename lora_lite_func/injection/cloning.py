"""Containers and objects cloned member by member, without a call of their own constructors."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from .references import WEAK, all_plain, slots

__all__ = [
    "built_in_base",
    "clone",
    "clone_weak",
    "has_modules_as_keys",
    "refill",
    "same_members",
]

_BASES: tuple[Any, ...] = (
    collections.OrderedDict,
    collections.defaultdict,
    collections.deque,
    list,
    set,
    dict,
    tuple,
    frozenset,
)


def same_members(new: Iterable[tuple[Any, Any]], old: Iterable[tuple[Any, Any]]) -> bool:
    """Whether (key, value) pairs are the very same objects, one by one."""
    return all(a is c and b is d for (a, b), (c, d) in zip(new, old, strict=True))


def has_modules_as_keys(value: Any) -> bool:
    """Whether a value is a dict in which modules are keys."""
    if not isinstance(value, dict) or all_plain(value):
        return False
    return any(isinstance(key, nn.Module) for key in value)


def clone(value: Any, members: Any = None) -> Any:
    """A container of the same class with these members, or with its own if none are given.

    A subclass is made without its constructor, which may ask for anything.
    """
    kind = type(value)
    members = value if members is None else members
    if kind in (list, set, frozenset, tuple, dict):
        return kind(members)
    base = built_in_base(kind)
    if hasattr(kind, "n_sequence_fields"):  # what torch.max and the like give
        return kind(members)
    if base in (tuple, frozenset):
        made = base.__new__(kind, members)
    else:
        made = base.__new__(kind)
        if base is collections.deque:
            base.__init__(made, (), value.maxlen)
        elif base is collections.defaultdict:
            base.__init__(made, value.default_factory)
        refill(made, members)
    for name in slots(kind):
        if hasattr(value, name):
            object.__setattr__(made, name, getattr(value, name))
    if hasattr(made, "__dict__"):
        made.__dict__.update(value.__dict__)
    return made


def refill(made: Any, members: Any) -> None:
    """Replace a container's members by these, without its class's own methods."""
    base = built_in_base(type(made))
    fill = base.extend if base in (list, collections.deque) else base.update
    base.clear(made)
    fill(made, members)


def clone_weak(value: Any, members: Iterable[Any]) -> Any:
    """A weak container of the same class and with the same attributes.

    Args:
        value: the container.
        members: what is in the new one: the members of a set, the (key, value) pairs of a mapping.
    """
    base = next(base for base in WEAK if isinstance(value, base))
    made = object.__new__(type(value))
    base.__init__(made)  # it has weak references to itself, which can't be another's
    notes = {name: item for name, item in vars(value).items() if name not in vars(made)}
    made.__dict__.update(notes)
    for member in members:
        base.add(made, member) if base is weakref.WeakSet else base.__setitem__(made, *member)
    return made


def built_in_base(kind: type) -> Any:
    """The built-in Python class that a container's class is derived from."""
    return next(base for base in _BASES if issubclass(kind, base))
