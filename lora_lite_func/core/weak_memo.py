"""What is found out about a class or a function's code once, and forgotten with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["WeakMemo"]

K = TypeVar("K")
V = TypeVar("V")


class WeakMemo(Generic[K, V]):
    """A function of a class or a code object, computed once for each that is alive.

    torch makes a class for each parametrized layer, and users define classes in functions: a plain
    dict would keep all of those. What is computed must not hold the key itself. Keys are ids, since
    a look-up in a WeakKeyDictionary costs ten times as much; an entry goes when its key does,
    before another object can get the id.
    """

    def __init__(self, compute: Callable[[K], V]) -> None:
        self._compute = compute
        self._found: dict[int, V] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    def __call__(self, key: K) -> V:
        found = id(key)
        known = self._found
        if found in known:
            return known[found]
        value = self._compute(key)
        self._references[found] = weakref.ref(key, lambda _: self._forget(found))
        self._found[found] = value
        return value

    def _forget(self, found: int) -> None:
        self._found.pop(found, None)
        self._references.pop(found, None)

    def __len__(self) -> int:
        return len(self._found)
