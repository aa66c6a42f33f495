"""What the modules of a copied tree hold besides tensors and children.

It is turned to the copies, or refused.
"""

from __future__ import annotations

import copy as copying
import dataclasses
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedError
from ..core.torch_internals import STATE_HOOKS, at_trace_time, own_attributes
from ..layers.kinds import KINDS
from .code_reads import reads_of
from .prompt_scope import under_scope
from .rebinding import MUTABLE, OWNED, Rebinding, own_object
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
from .unfollowed import leads, modules_in

__all__ = ["TreeReferences"]

_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OURS = ("_ll", "_ll_bound", "_ll_prompt", "_flat_weights", "_flat_weight_refs")
"""Attributes that are not looked at here.

A site or a bound model carries them, and a recurrent layer's list of its tensors is made again.
"""

_MANAGER = "_cached_continuous_batching_manager"
"""What transformers' continuous batching keeps on a model: it calls that model, so a copy of the
model has none, and makes its own.
"""

_CONFIGS = ("config", "generation_config", "cfg", "args", "hparams")


class _Noted(NamedTuple):
    """A module's copy and the names of its attributes and hooks to be turned."""

    copy: nn.Module
    path: str
    names: list[str]


class TreeReferences:
    """The references of one copied tree.

    Args:
        model: the original.
        copies: {id of an original module: its copy}, filled by the walk.
        base_tensors: what the tree has in place of the base's tensors.
        refuse: raise where something can't be followed; else leave it as it is.
    """

    def __init__(
        self, model: nn.Module, copies: dict[int, Any], base_tensors: Any, refuse: bool
    ) -> None:
        self.model, self.copies, self.refuse = model, copies, refuse
        self.tensor_for: Callable[..., Any] | None = getattr(base_tensors, "tensor_for", None)
        self.tensors: dict[int, Any] = getattr(base_tensors, "made", {})
        self.kept: bool = getattr(base_tensors, "kept", False)
        self.replaced: Container[str] = getattr(base_tensors, "replaced", ())
        self.hooks = (*_CALL_HOOKS, *STATE_HOOKS) if self.kept else _CALL_HOOKS
        self.noted: list[_Noted] = []
        self.readers: dict[type, tuple[str, str]] = {}
        self.records: dict[int, Any] = {}
        self.holder: Any = None
        self._index: dict[int, tuple[str, Any, str]] | None = None

    # ------------------------------------------------------------------------------ during the walk
    def note(self, copy: nn.Module, path: str, slots: tuple[str, ...], reads: bool) -> None:
        """Note what may have to be turned in a module's copy."""
        attributes = copy.__dict__
        names: list[str] = []
        for name, value in own_attributes(copy):
            if type(value) in PLAIN or name in _OURS:
                continue
            if name == _MANAGER:
                attributes[name] = None
            elif self.records and id(value) in self.records:
                attributes[name] = self.records[id(value)]
            elif self._concerns(name, value):
                names.append(name)
            if role_of(type(value)) == Role.OBJECT:
                self.readers.setdefault(type(value), (path, f"its attribute {name!r}"))
        state = attributes.get("_ll")
        kept = state is not None and state.own_forward is not None
        if kept or "forward" in attributes or "_ll_forward" in attributes:
            self._note_forward(attributes, path, names)
        if slots:
            held = [name for name in slots if hasattr(copy, name)]
            names += [name for name in held if self._concerns(name, getattr(copy, name))]
        hooked = (
            attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
        )
        if names or hooked or self.kept:
            self.noted.append(_Noted(copy, path, names))
        if reads:
            self.readers.setdefault(_own_class(type(copy)), (path, "its call"))

    def _note_forward(self, attributes: dict[str, Any], path: str, names: list[str]) -> None:
        """Note an instance's own `forward`, which a site keeps in its state."""
        forward = attributes.get("forward") or attributes.get("_ll_forward")
        state = attributes.get("_ll")
        if state is not None and state.own_forward is not None:
            forward = state.own_forward
            names.append("_ll")
        if forward is not None and not isinstance(forward, BINDABLE):
            raise UnsupportedError(
                f"{path!r}: its own `forward` is a {type(forward).__name__}, which may hold on "
                "to the original module; give the model as it was before that was put in"
            )

    def _concerns(self, name: str, value: Any) -> bool:
        kind = type(value)
        role = role_of(kind)
        if role == Role.CONTAINER:
            return kind is not tuple or not all_plain(value)
        if role == Role.DATA:
            return holds_numbers(value) or (self.kept and self._is_config(name, value))
        if role != Role.OBJECT:
            return refers(value)
        if self.kept or refers(value):
            return True
        if torch.compiler.is_dynamo_compiling() or not has_state(value):
            return False
        if all_plain(attributes_of_object(value).values()):
            # Many modules hold the same settings, so their copy is at hand for the others.
            self.records[id(value)] = own_object(value, self.copies)
        return True

    def _is_config(self, name: str, value: Any) -> bool:
        """Whether an attribute is the settings of a model, which tools write on."""
        kind = type(value)
        if role_of(kind) not in (Role.DATA, Role.OBJECT) or isinstance(value, Tensor):
            return False
        if kind.__module__ in ("builtins", "torch"):
            return False
        named = name in _CONFIGS or kind.__name__.endswith("Config")
        if not named and not dataclasses.is_dataclass(value):
            return False
        return not refers(value) or not any(modules_in(value, self.copies))

    # ------------------------------------------------------------------------------- after the walk
    def turn(self, root: nn.Module) -> None:
        """Turn what was noted.

        Raises:
            UnsupportedError: something leads to an original module and can't be turned.
        """
        if not self.noted and not self.readers:
            return
        rebinding = Rebinding(self.copies, self._tensor_for, self.tensors, self.model)
        for noted in self.noted:
            self._own(rebinding, noted)
        for noted in self.noted:
            if self.kept:
                for name in STATE_HOOKS:
                    noted.copy.__dict__[name] = noted.copy.__dict__[name].copy()
            self._turn(rebinding, noted)
        rebinding.turn_owned()
        self._check(rebinding, "", "a container of its modules holds")
        if not torch.compiler.is_dynamo_compiling():
            self._check_readers(rebinding)
        if rebinding.kept:
            root.__dict__["_ll_kept"] = rebinding.kept

    def _own(self, rebinding: Rebinding, noted: _Noted) -> None:
        """Give the copies containers and tensors of the tree's own."""
        copy: Any = noted.copy
        self.holder = copy
        for name in noted.names:
            value = _get(copy, name)
            if role_of(type(value)) in OWNED:
                _set(copy, name, rebinding.own(value))
            elif holds_numbers(value) and not _is_computed(copy, name):
                _set(copy, name, self._tensor_for(value, rebinding))

    def _turn(self, rebinding: Rebinding, noted: _Noted) -> None:
        copy, path, attributes = noted.copy, noted.path, noted.copy.__dict__
        self.holder = copy
        for name in noted.names:
            if name == "_ll":
                state = attributes[name]
                state.own_forward = rebinding.turned(state.own_forward)
            else:
                value = _get(copy, name)
                if self.kept and self._is_config(name, value):
                    _set(copy, name, copying.deepcopy(value, self.copies))
                elif not isinstance(value, MUTABLE):
                    _set(copy, name, rebinding.turned(value))
            self._check(rebinding, path, f"its attribute {name!r} holds")
        for name in self.hooks:
            held = attributes[name]
            for key, hook in held.items():
                held[key] = rebinding.turned(hook)
            if held:
                self._check(rebinding, path, "one of its hooks holds")

    def _check_readers(self, rebinding: Rebinding) -> None:
        """Look at what the code of calls reads, once for each class."""
        for cls, (path, who) in self.readers.items():
            for read in reads_of(cls):
                value = read.find()
                if not leads(value):
                    continue
                if isinstance(value, nn.Parameter):
                    self._tensor_for(value, rebinding)
                rebinding.note(read.what, value)
                self._check(rebinding, path, f"{who} reads")

    def _tensor_for(self, memory: Any, rebinding: Rebinding) -> Any:
        """What stands for a tensor or array that a module holds in an attribute or a container."""
        # Only a parameter, or what could become one, has to be looked for among the tree's tensors.
        found = None
        if isinstance(memory, Tensor) and (
            isinstance(memory, nn.Parameter) or memory.requires_grad
        ):
            if self._index is None:
                self._index = dict(self._tensors())
            found = self._index.get(id(memory))
        if found is None:
            return memory if self.tensor_for is None else self.tensor_for(memory, self.holder)
        path, copy, name = found
        state = copy.__dict__.get("_ll")
        replaced = (f"{path}.{name}" if path else name) in self.replaced
        if replaced or (state is not None and _adapts(state, name)):
            rebinding.unfollowed.append((f"the {name} of {path!r}", None))
        return copy._parameters[name] if name in copy._parameters else copy._buffers[name]

    def _tensors(self) -> Iterator[tuple[int, tuple[str, Any, str]]]:
        """(id of an original's tensor, (path, the module's copy, its name)), for each tensor."""
        for path, module in self.model.named_modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        yield id(tensor), (path, self.copies[id(module)], name)

    def _check(self, rebinding: Rebinding, path: str, where: str) -> None:
        if not rebinding.unfollowed:
            return
        what, found = rebinding.unfollowed[0]
        rebinding.unfollowed.clear()
        if not self.refuse:
            return
        names = self.model.named_modules(remove_duplicate=False)
        target = next((name for name, module in names if module is found), None)
        leads = "" if target is None else f", which leads to the module {target!r}"
        holder = type(self.model.get_submodule(path)).__name__
        raise UnsupportedError(
            f"{path!r} ({holder}): {where} {what}{leads}; that can't be turned to the adapted "
            "copy, so the original would be used, without its adapter; hold the module itself (or "
            "a list or dict of it) as an attribute, and reach it by that"
        )


@at_trace_time
def _own_class(cls: type) -> Any:
    """The class that a copy's class was made of."""
    return getattr(cls, "_ll_base", under_scope(cls))


def _get(copy: nn.Module, name: str) -> Any:
    """An attribute as it is stored, because a site's class may have a property of the same name."""
    attributes = copy.__dict__
    return attributes[name] if name in attributes else getattr(copy, name)


def _set(copy: nn.Module, name: str, value: Any) -> None:
    if name in copy.__dict__:
        copy.__dict__[name] = value
    else:
        # The attribute is in a slot.
        object.__setattr__(copy, name, value)


def _is_computed(copy: nn.Module, name: str) -> bool:
    """Whether a hook makes the attribute anew in each call (weight_norm, prune)."""
    return len(copy._forward_pre_hooks) > 0 and name in ("weight", "bias")


def _adapts(state: Any, name: str) -> bool:
    """Whether a site's adapters go into the tensor of this name."""
    around = any(not KINDS[a.site.kind].whole for a in state.attachments)
    return name in state.substituted or (around and name in ("weight", "bias"))
