"""A copy of the module tree, made for one call (or kept, for `bind`).

Every module of the copy is a new object of the same class with the same attributes; containers
among those are its own, and references to other modules lead to their copies. Parameters are shared
with the user's model, never written. Nothing is cached between calls, so flags, dtypes, devices and
replaced layers are always current.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..core.errors import StructureError, UnsupportedError
from ..core.torch_internals import CALL_HOOKS, at_trace_time, copy_attributes, flatten_again
from ..core.weak_memo import WeakMemo
from ..layers.kinds import KINDS, module_and_name
from ..layers.refusals import check_model, refusal
from .attachment import Attachment, everywhere
from .base_tensors import own_written
from .checks import no_module
from .code_reads import reads_of
from .in_place_writes import writes_directly
from .prompt_scope import has_own_prompt, is_scope, scope_class, takes_mask, under_scope
from .references import slots
from .site_copy import site_copy
from .tree_references import TreeReferences

__all__ = ["Copier", "copy_tree"]

_TENSORS_AND_CHILDREN = ("_parameters", "_buffers", "_modules")

Own = Callable[[nn.Module, str], None]
"""Takes (copy of a module, path), and replaces the base's parameters and buffers in the copy."""


def copy_tree(
    model: nn.Module,
    sites: Mapping[str, Sequence[Attachment]],
    base_tensors: Own,
    refuse: bool = True,
) -> nn.Module:
    """A copy of the module tree with the adapters at their paths.

    Args:
        model: the base; nothing is written on it.
        sites: {path: its adapters, in order}.
        base_tensors: called with each copied module; a BaseTensors is asked for more.
        refuse: whether to raise where something leads to an original module and can't be turned to
            its copy.

    Raises:
        StructureError: a site isn't there, has other dimensions, or is named twice through shared
            modules.
        UnsupportedError: the model is no module, or holds what can't be turned to the copy.
    """
    if not isinstance(model, nn.Module):
        check_model(model)
    return Copier(model, sites, base_tensors, refuse).whole()


class _ClassFacts(NamedTuple):
    """What is known of modules by their class alone.

    Attributes:
        refusal: why they can't be copied; None where they can.
        slots: the attributes that they keep in slots.
        has_inner: whether they read a child's weight without calling it (attention's out_proj).
        is_table: whether they may bound their table's norms in place.
        is_scope: whether they tell their sites the prompt of each call.
        is_special: whether one of has_inner, is_table and is_scope is true.
        reads: whether their calls may reach modules that nobody gave them.
        written: the tensors that their calls write on, by the attributes that lead there.
    """

    refusal: str | None
    slots: tuple[str, ...]
    has_inner: bool
    is_table: bool
    is_scope: bool
    is_special: bool
    reads: bool
    written: tuple[tuple[str, ...], ...]


def _facts(cls: type) -> _ClassFacts:
    inner = issubclass(cls, nn.MultiheadAttention)
    table = issubclass(cls, (nn.Embedding, nn.EmbeddingBag))
    scope = is_scope(cls)
    special = inner or table or scope
    reads = bool(reads_of(cls))
    written = writes_directly(cls)
    return _ClassFacts(refusal(cls), slots(cls), inner, table, scope, special, reads, written)


_FACTS = WeakMemo(_facts)


@at_trace_time
def _facts_of(cls: type) -> _ClassFacts:
    return _FACTS(cls)


class Copier:
    """One walk over the module tree.

    Attributes:
        copies: {id of an original module: its copy}.
        left: the modules with adapters that the walk hasn't come to.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Sequence[Attachment]],
        base_tensors: Own,
        refuse: bool,
    ) -> None:
        bare = [a[-1] for a in sites.values() if KINDS[a[-1].site.kind].bare]
        if any(attachment.p is not None for attachment in bare):
            # Those of a bound model are under each of their names already, with their own slots.
            sites = everywhere(model, sites)
        self.sites = _by_module(sites)
        self.left = dict.fromkeys(self.sites)
        self.root = model
        self.needs_prompt = any(map(_needs_prompt, sites.values()))
        self.base_tensors = base_tensors
        self.copies: dict[int, Any] = {}
        self.written: list[tuple[nn.Module, tuple[str, ...]]] = []
        self.references = TreeReferences(model, self.copies, base_tensors, refuse)

    def whole(self) -> nn.Module:
        """The copy of the whole tree, as `copy_tree` says."""
        root = self.visit(self.root, "", False)
        if self.left:
            raise no_module(self.root, next(iter(self.left)))
        if self.written:
            own_written(self.written, self.root, self.copies)
        self.references.turn(root)
        return root

    def visit(self, module: nn.Module, path: str, by_weight: bool) -> nn.Module:
        """The module's copy.

        With `by_weight` the module isn't called, so its adapters go into its weight.

        Raises:
            StructureError: the module is a site at two paths, or isn't what an adapter was made
                for.
            UnsupportedError: the module can't be copied.
        """
        attachments = self.sites.get(path)
        copy = self.copies.get(id(module))
        if copy is not None:
            if attachments is None:
                return copy
            raise StructureError(
                f"site {path!r} is the same module as one at another path; name that one alone"
            )
        facts = _facts_of(type(module))
        if facts.refusal is not None:
            raise UnsupportedError(f"{path!r} ({type(module).__name__}) {facts.refusal}")
        if attachments is None and not facts.is_special and not self.needs_prompt:
            copy = _shallow(module, type(module), facts.slots)
        else:
            copy = self._special(module, path, facts, attachments, by_weight)
        self.copies[id(module)] = copy
        self.base_tensors(copy, path)
        if "_flat_weights" in copy.__dict__:
            flatten_again(copy)
        self.references.note(copy, path, facts.slots, facts.reads)
        if copy._modules:
            self._visit_children(copy, path, attachments is not None)
        if facts.written:
            self.written += [(module, chain) for chain in facts.written]
        return copy

    def _special(
        self,
        module: nn.Module,
        path: str,
        facts: _ClassFacts,
        attachments: dict[str, Sequence[Attachment]] | None,
        by_weight: bool,
    ) -> nn.Module:
        """The copy of a site, a table or a scope."""
        inner: tuple[str, ...] = ()
        if facts.has_inner and _joined(path, "out_proj") in self.sites:
            inner = ("out_proj",)
        bounds = facts.is_table and module.__dict__.get("max_norm") is not None
        scope = facts.is_scope or (self.needs_prompt and self._has_prompt(module, path))
        make = _scope if scope else _shallow
        if attachments is None and not inner and not bounds:
            return make(module, under_scope(type(module)), facts.slots)
        self.left.pop(path, None)
        return site_copy(module, path, attachments or {}, by_weight, inner, facts.slots, make)

    def _has_prompt(self, module: nn.Module, path: str) -> bool:
        """Whether a module's calls know their prompt, where some sites ask for it."""
        if module is self.root or has_own_prompt(type(module)):
            return True
        inside = _joined(path, "")
        return takes_mask(type(module)) and any(site.startswith(inside) for site in self.sites)

    def _visit_children(self, copy: nn.Module, path: str, is_site: bool) -> None:
        before, prefix = len(self.left), _joined(path, "")
        children: dict[str, Any] = copy._modules
        inner = copy.__dict__["_ll"].inner if "_ll" in copy.__dict__ else ()
        for name, child in children.items():
            if child is not None:
                children[name] = self.visit(child, prefix + name, name in inner)
        if len(self.left) < before or is_site:
            _leave_fast_path(copy)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _by_module(
    sites: Mapping[str, Sequence[Attachment]],
) -> dict[str, dict[str, Sequence[Attachment]]]:
    """{path of a module: {"" for its own adapters, else the name of the tensor: adapters}}."""
    found: dict[str, dict[str, Sequence[Attachment]]] = {}
    for path, attachments in sites.items():
        site, name = attachments[-1].site, ""
        if KINDS[site.kind].bare:
            path, name = module_and_name(site)
        found.setdefault(path, {})[name] = attachments
    return found


def _shallow(module: nn.Module, cls: type[nn.Module], kept: tuple[str, ...]) -> nn.Module:
    """A new object of class `cls` with the module's attributes.

    It has dicts of tensors, children and hooks of its own.
    """
    copy = object.__new__(cls)
    if torch.compiler.is_dynamo_compiling():
        copy_attributes(module, copy)
    else:
        # a dict is copied as a whole in a fraction of the time that it takes to fill one
        object.__setattr__(copy, "__dict__", module.__dict__.copy())
    attributes = copy.__dict__
    for name in kept:
        if hasattr(module, name):
            object.__setattr__(copy, name, getattr(module, name))
    for name in _TENSORS_AND_CHILDREN:
        attributes[name] = attributes[name].copy()
    # The copy has dicts of its own, because some models install hooks while they run.
    for name in CALL_HOOKS:
        attributes[name] = attributes[name].copy() if attributes[name] else OrderedDict()
    # It has a set of its own, because some models make masks while they run.
    attributes["_non_persistent_buffers_set"] = attributes["_non_persistent_buffers_set"].copy()
    # `module.compile()` bound the compiled call to the original.
    if "_compiled_call_impl" in attributes:
        del attributes["_compiled_call_impl"]
    # The module is a site of a bound model.
    if "_ll" in attributes:
        attributes["_ll"] = replace(attributes["_ll"])
    return copy


def _scope(module: nn.Module, cls: type[nn.Module], kept: tuple[str, ...]) -> nn.Module:
    """`_shallow` of a class whose calls tell the sites inside their prompt."""
    copy = _shallow(module, scope_class(cls), kept)
    # A forward on the instance would shadow the class's.
    if "forward" in copy.__dict__:
        copy.__dict__["_ll_forward"] = copy.__dict__.pop("forward")
    return copy


def _needs_prompt(attachments: Sequence[Attachment]) -> bool:
    """Whether one of a site's adapters has to be told the prompt."""
    for attachment in attachments:
        if attachment.prompt is None and KINDS[attachment.site.kind].listed:
            return True
    return False


def _leave_fast_path(copy: Any) -> None:
    """Keep torch's fused encoder kernels from running where a site is inside.

    They read weights without calling the layers.
    """
    if isinstance(copy, nn.TransformerEncoderLayer):
        copy.__dict__["activation_relu_or_gelu"] = 0
    elif isinstance(copy, nn.TransformerEncoder):
        copy.__dict__["use_nested_tensor"] = False
