"""What the user's code reads that nobody gave it: a global, an attribute of a class, a variable
around a function, a default.

A module that is found so is the original, which has no adapter.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from ..core.weak_memo import WeakMemo
from .references import is_users
from .unfollowed import leads_by_type

__all__ = ["Read", "calls_of", "reads_of", "reads_of_function"]

_MOST_FUNCTIONS = 300
_MOST_MEMBERS = 2_000


class Read(NamedTuple):
    """A place where a user's code may find a module that nobody gave it.

    Attributes:
        what: the place in words.
        find: gives what is there now.
    """

    what: str
    find: Callable[[], Any]


class _Walk:
    """One walk over the user's code that a call may reach.

    Functions are followed to those that they name, in all classes that they name: too many rather
    than too few. Nothing that is noted holds on to a class or a function.

    Attributes:
        reads: the places found.
    """

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self.classes: list[type] = []
        self._names: set[str] = set()
        self._functions: set[int] = set()
        self._places: set[tuple[int, str]] = set()

    def follow_class(self, cls: type) -> None:
        """Follow a class, and those that it inherits from, by all the names that are known."""
        for base in cls.__mro__:
            if base not in self.classes and is_users(base.__module__ or ""):
                self.classes.append(base)
                for name in self._names.intersection(vars(base)):
                    self._attribute(base, name)

    def follow_names(self, names: Iterable[str]) -> None:
        """Follow names in all the classes that are known."""
        for name in names:
            if name not in self._names:
                self._names.add(name)
                for cls in [cls for cls in self.classes if name in vars(cls)]:
                    self._attribute(cls, name)

    def follow_function(self, function: types.FunctionType, around: bool = True) -> None:
        """Follow a function by what it names, and with `around` by its closure and defaults."""
        known = id(function) in self._functions or len(self._functions) >= _MOST_FUNCTIONS
        if known or not is_users(function.__module__ or ""):
            return
        self._functions.add(id(function))
        named = _NAMES(function.__code__)
        self.follow_names(named)
        for name in sorted(_READ(function.__code__)):
            if name in function.__globals__ or not hasattr(builtins, name):
                self._global(function, name, named)
        for name in _parts(function) if around else ():
            find = _part(weakref.ref(function), name)
            self._place(f"{name} of the function {function.__qualname__!r}", function, find)

    def _attribute(self, cls: type, name: str) -> None:
        """Follow an attribute of a class, as it is in the class itself."""
        if isinstance(vars(cls)[name], _CACHED):  # a method's results go by the object, a copy
            self.follow_function(vars(cls)[name].__wrapped__)
            return
        reference = weakref.ref(cls)
        self._place(
            f"the attribute {name!r} of the class {cls.__name__!r}",
            cls,
            lambda: vars(held).get(name) if (held := reference()) is not None else None,
        )

    def _global(self, function: types.FunctionType, name: str, named: Iterable[str]) -> None:
        """Follow a global that a function reads; of a Python module, those of it that are named."""
        value = function.__globals__.get(name)
        if not isinstance(value, types.ModuleType):
            reference = weakref.ref(function)
            self._place(
                f"the global {name!r}",
                function.__globals__,
                lambda: held.__globals__.get(name) if (held := reference()) is not None else None,
            )
        elif is_users(value.__name__):
            for inner in sorted(set(named).intersection(vars(value))):
                find = functools.partial(vars(value).get, inner)
                self._place(f"the global '{name}.{inner}'", vars(value), find)

    def _place(self, what: str, home: Any, find: Callable[[], Any]) -> None:
        """Follow what is at a place, and note the place where a module may be there."""
        if (id(home), what) in self._places:
            return
        self._places.add((id(home), what))
        value = find()
        for function in _functions_in(value):
            self.follow_function(function)
        kind = value if isinstance(value, type) else type(value)
        if not isinstance(value, nn.Module) and is_users(kind.__module__ or ""):
            self.follow_class(kind)
        if value is None or leads_by_type(value):
            self.reads.append(Read(what, find))


def _functions_in(value: Any) -> Iterator[types.FunctionType]:
    """The functions that an object calls, as far as it is one, wraps one, or is a container of
    such.
    """
    held: Any = (value,)
    if type(value) in (list, tuple, set, frozenset, dict):
        held = list(value.values() if type(value) is dict else value)[:_MOST_MEMBERS]
    for item in held:
        if isinstance(item, types.FunctionType):
            yield item
        elif isinstance(item, _WRAPPERS):
            inner = (getattr(item, name, None) for name in _WRAPPED)
            yield from (f for f in inner if isinstance(f, types.FunctionType))


_CACHED = type(functools.lru_cache(len))
_WRAPPED = ("func", "__func__", "__wrapped__", "fget", "fset")
_WRAPPERS = (
    functools.partial,
    functools.partialmethod,
    functools.cached_property,
    functools.singledispatchmethod,
    types.MethodType,
    staticmethod,
    classmethod,
    property,
    _CACHED,
)


def _parts(function: types.FunctionType) -> Iterator[str]:
    """The parts of a function where values are kept. `__class__` is the class that it is in."""
    yield from (f"the variable {n!r}" for n in function.__code__.co_freevars if n != "__class__")
    if function.__defaults__ is not None or function.__kwdefaults__ is not None:
        yield _DEFAULT
    if function.__dict__:
        yield _ATTRIBUTE


_DEFAULT, _ATTRIBUTE = "a default", "an attribute"


def _part(reference: weakref.ref[types.FunctionType], part: str) -> Callable[[], Any]:
    """What is kept in a part of a function, to be asked again."""

    def find() -> Any:
        function = reference()
        if function is None:
            return None
        if part == _ATTRIBUTE:
            return list(vars(function).values())
        if part == _DEFAULT:
            return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        pairs = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        cell = next(cell for name, cell in pairs if part == f"the variable {name!r}")
        try:
            return cell.cell_contents
        except ValueError:  # it isn't filled yet
            return None

    return find


# ------------------------------------------------------------------------------------ by their code
def _read(code: types.CodeType) -> frozenset[str]:
    """The globals that a function and the functions inside it read."""
    names = {
        i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    inner = [_read(held) for held in code.co_consts if isinstance(held, types.CodeType)]
    return frozenset(names).union(*inner)


_READ = WeakMemo(_read)


def _names(code: types.CodeType) -> frozenset[str]:
    """The attributes and globals that a function and the functions inside it name."""
    inner = [_names(held) for held in code.co_consts if isinstance(held, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


_NAMES = WeakMemo(_names)


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


# --------------------------------------------------------------------------------- of whole classes
def _reads_of(cls: type) -> tuple[Read, ...]:
    walk = _Walk()
    walk.follow_class(cls)
    homes = {base.__module__.partition(".")[0] for base in cls.__mro__ if base not in walk.classes}
    known = all(home == "torch" or home in sys.stdlib_module_names for home in homes)
    # Of a class of another library, nothing says what it calls.
    every = [name for base in walk.classes for name in vars(base)]
    walk.follow_names(_CALLS if known and issubclass(cls, nn.Module) else every)
    return tuple(walk.reads)


_CALLS = ("forward", "__call__", "__getattr__", "__getattribute__")

reads_of = WeakMemo(_reads_of)
"""The places where the calls of a class may find modules that nobody gave them."""


def _reads_of_function(function: types.FunctionType) -> tuple[Read, ...]:
    walk = _Walk()
    walk.follow_function(function, around=False)
    return tuple(walk.reads)


reads_of_function = WeakMemo(_reads_of_function)
"""Likewise those of a function, its closure and its defaults left out."""
