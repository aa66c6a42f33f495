"""A copied tree that serves one call after another, as long as it is what a new copy would be.

A copy is made for one call, which owns it. It may serve another call once nobody else holds a part
of it (gradient checkpointing does until the backward pass is done), where the call has left nothing
on its modules, and while the model is what it was when the copy was made. All of that is checked,
object by object, and a tree that can't be checked is not kept.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from ..core.torch_internals import CALL_HOOKS, is_wrapped, outside_transforms, own_attributes
from ..layers.kinds import KINDS
from .attachment import Attachment
from .base_tensors import Constants
from .linear import choose
from .references import PLAIN, Role, all_plain, is_users, role_of, slots
from .state import SiteState
from .tree_copy import Copier
from .unfollowed import global_names

__all__ = ["KeptTree", "kept_tree"]


class _State:
    """Everything that some modules hold, to be compared with what they hold later.

    A call looks at all of it, so it is in flat lists, which are compared without a step of Python
    for each object.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.classes: list[type[nn.Module]] = []
        self.hooks: list[Mapping[Any, Any]] = []
        self.dicts: list[dict[str, Any]] = []
        self.sizes: list[int] = []
        self.names: list[str] = []
        self.values: list[Iterable[Any]] = []
        self.held: list[Any] = []
        self.containers: list[tuple[Any, Any]] = []

    def add(self, module: nn.Module, is_copy: bool) -> bool:
        """Add a module's state; False where something in it may change unseen."""
        attributes = module.__dict__
        hooks = [attributes[name] for name in CALL_HOOKS]
        if any(hooks) or slots(type(module)) or global_names(type(module)):
            return False
        for _, value in own_attributes(module):
            if type(value) in PLAIN or (is_copy and type(value) is SiteState):
                continue
            contents = _contents(value)
            if contents is not None:
                self.containers.append((value, contents))
            elif not _is_settled(value):
                return False
        names: Any = module._non_persistent_buffers_set
        if names:
            self.containers.append((names, _contents(names)))
        self.modules.append(module)
        self.classes.append(type(module))
        self.hooks += hooks
        dicts: Any = (attributes, module._parameters, module._buffers, module._modules)
        for held in dicts:
            self.dicts.append(held)
            self.values.append(held.values())
            self.sizes.append(len(held))
            self.names += held
            self.held += held.values()
        return True

    def is_same(self) -> bool:
        """Whether the modules hold the very same objects, and no hooks."""
        return (
            not any(self.hooks)
            and list(map(type, self.modules)) == self.classes
            and list(map(len, self.dicts)) == self.sizes
            and list(chain.from_iterable(self.dicts)) == self.names
            and all(map(is_, chain.from_iterable(self.values), self.held))
            and all(_contents(value) == contents for value, contents in self.containers)
        )


def _contents(value: Any, depth: int = 0) -> Any:
    """What is in a dict, list, set or tuple of plain values; None for anything else."""
    kind = type(value)
    if kind not in (dict, list, set, tuple, frozenset) or depth > _DEEPEST:
        return None
    members = list(value.values()) if kind is dict else list(value)
    inner = [item if type(item) in PLAIN else _contents(item, depth + 1) for item in members]
    if any(found is None and item is not None for found, item in zip(inner, members, strict=True)):
        return None
    if kind is dict:
        return (kind, tuple(value), tuple(inner)) if all_plain(value) else None
    return (kind, tuple(inner) if kind in (list, tuple) else frozenset(inner))


_DEEPEST = 8
"""How deep containers are looked into; one may hold itself."""


def _is_settled(value: Any) -> bool:
    """Whether a call's copy of a module may have this very object, whatever is done to it.

    Settings, devices and classes are settled, and so are functions that reach nothing but their
    arguments.
    """
    if isinstance(value, types.FunctionType):
        alone = not value.__closure__ and not value.__defaults__ and not value.__kwdefaults__
        return alone and not is_users(value.__module__ or "")
    return role_of(type(value)) == Role.DATA and not isinstance(value, Tensor)


class KeptTree:
    """A copy of a model, with what shows that it can serve another call.

    Attributes:
        root: the copy of the model. Whoever holds on to it keeps the tree from serving again.
    """

    def __init__(
        self,
        root: nn.Module,
        original: _State,
        copy: _State,
        sites: list[tuple[str, SiteState]],
        detached: list[tuple[Tensor, Tensor]],
    ) -> None:
        self.root = root
        self.original, self.copy = original, copy
        self.sites, self.detached = sites, detached
        self.tensors = [t for t in original.held if isinstance(t, Tensor)]
        self.facts = list(map(_FACTS, self.tensors))
        self.counts: list[int] = []

    def begin(self) -> None:
        """Note how often the tree itself refers to each of its modules and dicts."""
        self.counts = self._counts()

    def is_done(self) -> bool:
        """Whether a call has left the tree as it was, and nobody else refers to a part of it."""
        return self._counts() == self.counts and self.copy.is_same()

    def _counts(self) -> list[int]:
        # an object that stands for a layer in its call has the layer's own dict
        return list(map(sys.getrefcount, chain(self.copy.modules, self.copy.dicts)))

    def release(self) -> None:
        """Let go of the adapters of the call that is done."""
        for _, state in self.sites:
            _give(state, ())

    def serves(self, sites: Mapping[str, Sequence[Attachment]]) -> bool:
        """Give the sites other adapters; False, with nothing done, where the model has changed."""
        if not self.original.is_same() or list(map(_FACTS, self.tensors)) != self.facts:
            return False
        for own, constant in self.detached:
            if own.data_ptr() != constant.data_ptr() or not _same_notes(own, constant):
                return False
        for path, state in self.sites:
            _give(state, tuple(sites[path]))
        return True


_FACTS = attrgetter("shape", "dtype", "device", "requires_grad")
"""What may change of a parameter that stays the same object."""


def _give(state: SiteState, attachments: tuple[Attachment, ...]) -> None:
    if state.substituted:
        state.substituted = {"weight": attachments}
    else:
        state.attachments = attachments
        state.step = choose(attachments)


def kept_tree(
    model: nn.Module, sites: Mapping[str, Sequence[Attachment]]
) -> tuple[nn.Module, KeptTree | None]:
    """A copy of the model with these adapters, for one call, and the same as one to be kept.

    Raises:
        StructureError, UnsupportedError: as `copy_tree`.
    """
    # what a transform wraps is dead after it, so a kept copy's constants are made outside of it
    own = not any(map(is_wrapped, chain(model.parameters(), model.buffers())))
    with outside_transforms() if own else contextlib.nullcontext():
        copier = Copier(model, sites, Constants({}), True)
        root = copier.whole()
        return root, _kept(model, root, copier.copies, sites) if own else None


def _kept(
    model: nn.Module,
    root: nn.Module,
    copies: Mapping[int, nn.Module],
    sites: Mapping[str, Sequence[Attachment]],
) -> KeptTree | None:
    """The copy as a tree that can be kept; None where it can't."""
    before, after = _State(), _State()
    detached: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        copy = copies[id(module)]
        if not before.add(module, False) or not after.add(copy, True):
            return None
        for own, other in zip(_tensors(module), _tensors(copy), strict=True):
            if own is other:
                continue
            if type(own) is not nn.Parameter or not _is_detached(own, other):
                return None  # it was made for this call
            detached.append((own, other))
    held = []
    for path, attachments in sites.items():
        kinds = [KINDS[attachment.site.kind] for attachment in attachments]
        if any(kind.bare or kind.listed for kind in kinds):
            return None  # which tensors are tied, or which tokens are the prompt's, may differ
        module = model.get_submodule(path)
        state: SiteState = copies[id(module)].__dict__["_ll"]
        if state.own_forward is not None or "_ll" in module.__dict__:
            return None  # the layer's call isn't its class's, or has other adapters in it
        held.append((path, state))
    return KeptTree(root, before, after, held, detached)


def _same_notes(own: Tensor, constant: Tensor) -> bool:
    """Whether the attributes that somebody has set on a parameter are those of its constant."""
    notes, kept = own.__dict__, constant.__dict__
    if not notes and not kept:
        return True
    return notes.keys() == kept.keys() and all(map(is_, notes.values(), kept.values()))


def _tensors(module: nn.Module) -> Iterator[Any]:
    return chain(module._parameters.values(), module._buffers.values())


def _is_detached(own: Tensor, other: Any) -> bool:
    """Whether `other` is a parameter's own values, without its gradient."""
    return type(other) is Tensor and own.data_ptr() == other.data_ptr()
