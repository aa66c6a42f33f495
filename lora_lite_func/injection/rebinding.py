"""Turns references to modules of the original tree to their copies, and copies containers.

A model may reach its modules by other ways than their parent: a bound forward, a list of layers,
the closure of a hook. What can't be followed is noted, so that it can be refused by name.
"""

from __future__ import annotations

import collections
import functools
import gc
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.torch_internals import TRACES_IDS, attributes_of
from .cloning import clone, clone_weak, has_modules_as_keys, refill, same_members
from .code_reads import reads_of_function
from .references import (
    BINDABLE,
    PLAIN,
    Role,
    all_plain,
    attributes_of_object,
    has_state,
    holds_numbers,
    refers,
    role_of,
)
from .turned_values import (
    turned_built_in_method,
    turned_cache,
    turned_cell,
    turned_method,
    turned_partial,
    turned_proxy,
)
from .unfollowed import leads, modules_in

__all__ = ["MUTABLE", "OWNED", "Rebinding", "own_object", "turn_callables"]

_NOTHING: Any = (None, None, {})
MUTABLE = (list, dict, set, collections.deque)
OWNED = (Role.CONTAINER, Role.OBJECT, Role.WRAPPER)
"""The roles of what a call may write on, so that a copied tree has its own."""


class Rebinding:
    """The turned references of one tree.

    Args:
        copies: {id of an original module: its copy}. Other objects are added as they are copied, so
            that what was one object stays one.
        tensor_for: (tensor or array, self) -> what stands for one that a container or a closure
            holds; None leaves those as they are.
        tensors: {id of a tensor or array of the base: the tree's own one}.
        root: the original of the whole tree, where it is a whole one.

    Attributes:
        unfollowed: what may hold original modules and can't be turned, as (what it is, a module
            that it reaches).
        kept: copies of objects that only weak references lead to. Whoever keeps the tree has to
            keep them.
    """

    def __init__(
        self,
        copies: dict[int, Any],
        tensor_for: Callable[[Any, Rebinding], Any] | None = None,
        tensors: Mapping[int, Any] | None = None,
        root: nn.Module | None = None,
    ) -> None:
        self.copies = copies
        self.root = root
        self.tensors = {} if tensors is None else tensors
        self.tensor_for = tensor_for
        self.by_id = TRACES_IDS or not torch.compiler.is_dynamo_compiling()
        self.unfollowed: list[tuple[str, nn.Module | None]] = []
        self.kept: list[Any] = []
        self._owned: list[Any] = []
        self._fixed: dict[int, Any] = {}
        self._entered: set[int] = set()

    # ------------------------------------------------------------------------------ own containers
    def own(self, value: Any) -> Any:
        """A container or object of the tree's own in place of a module's.

        So nothing is put into the original. The members stay what they are until `turn_owned`, and
        those of an object that refers to modules until the object is turned.
        """
        if not self.by_id:
            return self.turned(value)
        role = role_of(type(value))
        if role != Role.CONTAINER and torch.compiler.is_dynamo_compiling():
            return value  # a compiler can't ask for an object's id
        known = self.copies.get(id(value), self._fixed.get(id(value)))
        if known is not None:
            return known
        if role == Role.OBJECT:
            return self._own_object(value)
        if role == Role.WRAPPER:
            return self._own_inside(value)
        if isinstance(value, (tuple, frozenset)):
            return self._own_fixed(value)
        made = clone(value)
        self.copies[id(value)] = self.copies[id(made)] = made
        notes = _notes(made)
        for name, item in notes.items():
            notes[name] = self._own_member(item)
        held = made.values() if isinstance(made, dict) else made
        if all_plain(held) and not (notes or has_modules_as_keys(made)):
            return made
        self._owned.append(made)
        if isinstance(made, dict):
            refill(made, {key: self._own_member(item) for key, item in made.items()})
        else:
            refill(made, [self._own_member(item) for item in made])
        return made

    def _own_object(self, value: Any) -> Any:
        if refers(value):
            # `turned` makes its copy, around these; the object may be in one of them
            if id(value) not in self._entered:
                self._entered.add(id(value))
                for item in attributes_of_object(value).values():
                    self._own_member(item)
            return value
        if not has_state(value):
            return value
        return own_object(value, self.copies, self._own_member)

    def _own_inside(self, value: Any) -> Any:
        """A wrapper itself, of which `turned` makes the copy, around own members."""
        if isinstance(value, types.MappingProxyType):
            self._own_member(*gc.get_referents(value))
        elif isinstance(value, weakref.WeakKeyDictionary):
            for item in list(value.values()):
                self._own_member(item)
        return value

    def _own_fixed(self, value: Any) -> Any:
        """A tuple, of a class of its own perhaps, or a frozen set; `turned` turns its members."""
        members = [self._own_member(item) for item in value]
        if all(a is b for a, b in zip(members, value, strict=True)):
            return value
        self._fixed[id(value)] = made = clone(value, members)
        return made

    def _own_member(self, item: Any) -> Any:
        kind = type(item)
        if kind in PLAIN:
            return item
        if role_of(kind) in OWNED:
            return self.own(item)
        if self.tensor_for is not None and holds_numbers(item):
            return self.tensor_for(item, self)
        return item

    def turn_owned(self) -> None:
        """Turn the members of all own containers, in place."""
        for made in self._owned:
            notes = _notes(made)
            for name, item in notes.items():
                notes[name] = self.turned(item)
            if isinstance(made, dict):
                refill(made, {self.turned(k): self.turned(v) for k, v in made.items()})
            else:
                refill(made, [self.turned(item) for item in made])

    # ----------------------------------------------------------------------------------- references
    def turned(self, value: Any) -> Any:
        """`value` with every reference to an original module turned to the module's copy.

        It is `value` itself if there is no such reference.
        """
        kind = type(value)
        if kind in PLAIN:
            return value
        role = role_of(kind)
        if role == Role.DATA:
            owned = len(self.tensors) > 0 and holds_numbers(value)
            return self.tensors.get(id(value), value) if owned else value
        if role == Role.POINTER:
            return self._pointer(value)
        if not self.by_id and role == Role.CONTAINER:
            return self._container(value) if refers(value) else value
        value = self._fixed.get(id(value), value)
        known = self.copies.get(id(value))
        if known is not None:
            return known
        if role == Role.OPAQUE:
            self.note(f"an object of {kind.__name__}", value)
            return value
        if role == Role.OBJECT:
            return self._object(value) if refers(value) or self._holds_owned(value) else value
        if not refers(value):
            return value
        if role == Role.WRAPPER:
            return self._wrapper(value)
        return self._container(value)

    def _holds_owned(self, value: Any) -> bool:
        """Whether an object has a container that is also a module's."""
        held = attributes_of_object(value).values()
        return any(isinstance(item, MUTABLE) and id(item) in self.copies for item in held)

    def note(self, what: str, value: Any) -> None:
        """Note an original module that `value`, which can't be turned, leads to.

        A traced call can't ask the garbage collector, so it notes none.
        """
        if not torch.compiler.is_dynamo_compiling():
            self.unfollowed += [(what, module) for module in modules_in(value, self.copies)]

    def _container(self, value: Any) -> Any:
        if isinstance(value, dict):
            new = {self.turned(k): self.turned(v) for k, v in value.items()}
            made = value if same_members(new.items(), value.items()) else clone(value, new)
        else:
            members = [self.turned(item) for item in value]
            same = all(a is b for a, b in zip(members, value, strict=True))
            made = value if same else clone(value, members)
        if self.by_id:
            self.copies[id(value)] = made
        return made

    def _wrapper(self, value: Any) -> Any:
        """A view of a mapping, or a weak mapping or set."""
        view = isinstance(value, types.MappingProxyType)
        made = self._view(value) if view else self._weak(value)
        self.copies[id(value)] = self.copies[id(made)] = made
        return made

    def _view(self, value: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            new = {self.turned(k): self.turned(v) for k, v in value.items()}
            same = same_members(new.items(), value.items())
            return value if same else types.MappingProxyType(new)
        (held,) = gc.get_referents(value)
        turned = self.turned(held)
        return value if turned is held else types.MappingProxyType(turned)

    def _weak(self, value: Any) -> Any:
        """A weak mapping or set; a tree has its own one in any case, as a call may put more in."""
        alone = isinstance(value, weakref.WeakSet)
        held = [(item, item) for item in value] if alone else list(value.items())
        new = [(self.turned(key), self.turned(item)) for key, item in held]
        if self.tensor_for is None and same_members(new, held):
            return value
        for now, before in zip(sum(new, ()), sum(held, ()), strict=True):
            if now is not before and not isinstance(now, (nn.Module, *PLAIN)):
                self.kept.append(now)
        return clone_weak(value, [key for key, _ in new] if alone else new)

    def _object(self, value: Any) -> Any:
        """A copy of an object of a user's class whose attributes refer to modules.

        The copy is around the modules' copies, and is the same one wherever the object is held.
        """
        # The copy is noted first, because the object may refer to itself.
        made = self.copies[id(value)] = _new_object(type(value))
        attributes = attributes_of_object(value)
        new = {name: self.turned(item) for name, item in attributes.items()}
        if all(new[name] is item or item is value for name, item in attributes.items()):
            self.copies[id(value)] = value
            return value
        for name, item in new.items():
            object.__setattr__(made, name, item)
        return made

    def _pointer(self, value: Any) -> Any:
        kind = type(value)
        if kind in weakref.ProxyTypes:
            return turned_proxy(value, self.turned)
        if issubclass(kind, Tensor):
            return value if self.tensor_for is None else self.tensor_for(value, self)
        if issubclass(kind, nn.Module):
            return self._module(value)
        if issubclass(kind, types.MethodType):
            return turned_method(value, self.turned)
        if issubclass(kind, types.FunctionType):
            return self._function(value)
        if issubclass(kind, functools.partial):
            return turned_partial(value, self.turned)
        if issubclass(kind, types.BuiltinMethodType):
            return turned_built_in_method(value, self.turned)
        if issubclass(kind, weakref.ReferenceType):
            return self._reference(value)
        return turned_cache(value, self.turned)

    def _module(self, value: nn.Module) -> nn.Module:
        """A module's copy; one from outside the tree itself, which mustn't call those inside."""
        made: nn.Module | None = self.copies.get(id(value))
        if made is not None:
            return made
        if self.root is not None and not torch.compiler.is_dynamo_compiling():
            inside = [m for m in value.modules() if id(m) in self.copies]
            if inside and self.root not in inside:
                what = f"a {type(value).__name__} that isn't registered as a module"
                self.unfollowed.append((what, inside[0]))
        return value

    def _reference(self, value: Any) -> Any:
        target = value()
        owner = self.turned(target)
        if owner is target:
            return value
        if not isinstance(owner, nn.Module):
            self.kept.append(owner)
        return type(value)(owner)

    def _function(self, value: Any) -> Any:
        """A function whose closure, defaults or attributes refer to modules, around the modules'
        copies.
        """
        known = self.copies.get(id(value))
        if known is not None:
            return known
        # The function is noted first, because it may be in its own closure.
        self.copies[id(value)] = value
        self._note_globals(value)
        cells = value.__closure__ or ()
        held = (value.__defaults__, value.__kwdefaults__, value.__dict__)
        if not cells and held == _NOTHING:
            return value
        new_cells = tuple(turned_cell(cell, self.turned) for cell in cells)
        defaults, keywords, attributes = new = tuple(self.turned(part) for part in held)
        pairs = (*zip(new_cells, cells, strict=True), *zip(new, held, strict=True))
        if all(a is b for a, b in pairs):
            return value
        own = tuple(types.CellType() if _holds(cell, value) else cell for cell in new_cells)
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, own)
        for cell, before in zip(own, new_cells, strict=True):
            if cell is not before:
                cell.cell_contents = made
        made.__kwdefaults__ = keywords
        made.__dict__.update(attributes)
        self.copies[id(value)] = made
        return made

    def _note_globals(self, function: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        for read in reads_of_function(function):
            value = read.find()
            if leads(value):
                what = f"the function {function.__qualname__!r}, which reads {read.what}"
                self.note(what, value)


def _notes(container: Any) -> dict[str, Any]:
    """The attributes of a container of a class of its own; a compiler knows none."""
    return {} if torch.compiler.is_dynamo_compiling() else getattr(container, "__dict__", {})


def _holds(cell: Any, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:
        return False


def own_object(value: Any, copies: dict[int, Any], own: Callable[[Any], Any] | None = None) -> Any:
    """A copy of an object of a user's class, which is noted among the copies.

    Args:
        value: the object.
        copies: as in `Rebinding`.
        own: what is done with each of its attributes; None: they are plain.
    """
    # The copy is noted first, because the object may refer to itself.
    made = copies[id(value)] = _new_object(type(value))
    copies[id(made)] = made
    for name, item in attributes_of_object(value).items():
        object.__setattr__(made, name, item if own is None else own(item))
    return made


def _new_object(kind: Any) -> Any:
    """An object of a class without its constructor, which may ask for anything."""
    return (kind if kind is types.SimpleNamespace else object).__new__(kind)


def turn_callables(module: nn.Module, copies: dict[int, Any]) -> None:
    """Turn the callables among a module's attributes, its own `forward` among them, to copies.

    Args:
        module: a copy, which is written on.
        copies: {id of an original module: its copy}. Other objects are added as they are copied.
    """
    rebinding = Rebinding(copies)
    for name, value in attributes_of(module).items():
        if isinstance(value, BINDABLE):
            module.__dict__[name] = rebinding.turned(value)
