"""A copy of the module tree, made for one call (or kept, for `bind`).

Every module of the copy is a new object of the same class with the same attributes; parameters and buffers are shared with the
user's model, never written. Nothing is cached between calls, so flags, dtypes, devices and replaced layers are always current.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import StructureError, UnsupportedError
from ..core.torch_internals import at_trace_time
from ..layers.kinds import KINDS, module_and_name
from ..layers.refusals import check_model, refusal
from .attachment import Attachment, everywhere
from .checks import no_module
from .references import BINDABLE, PLAIN, rebound, refers, slots
from .site_copy import site_copy
from .weight_route import flatten_again

__all__ = ["BaseTensors", "Constants", "constant", "copy_tree", "own_bias", "own_buffers"]

_TENSORS_AND_CHILDREN = ("_parameters", "_buffers", "_modules")
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
_OURS = frozenset({"_ll", "_ll_bound"})
"""What a site or a bound model carries, which refers to nothing of the original tree."""

_BASE_ATTRIBUTES = len(nn.Module().__dict__)

BaseTensors = Callable[[nn.Module, str], None]
"""(copy of a module, path): replaces the parameters and buffers that the copy has from the base."""


def copy_tree(
    model: nn.Module, sites: Mapping[str, Sequence[Attachment]], base_tensors: BaseTensors
) -> nn.Module:
    """A copy of the module tree with the adapters at their paths.

    Args:
        model: the base; nothing is written on it.
        sites: {path: its adapters, in order}.
        base_tensors: called with each copied module.

    Raises:
        StructureError: a site isn't there, has other dimensions, or is named twice through shared
            modules.
        UnsupportedError: it is no module, or an instance-level forward can't be re-bound to the
            copy.
    """
    if not isinstance(model, nn.Module):
        check_model(model)
    copier = _Copier(model, sites, base_tensors)
    root = copier.visit(model, "", False)
    if copier.left:
        raise no_module(model, next(iter(copier.left)))
    copier.rebind()
    return root


class _ClassFacts(NamedTuple):
    """What is known of modules by their class alone.

    Attributes:
        refusal: why they can't be copied; None where they can.
        slots: the attributes that they keep in slots.
        has_inner: whether they read a child's weight without calling it (attention's out_proj).
        is_table: whether they may bound their table's norms in place.
    """

    refusal: str | None
    slots: tuple[str, ...]
    has_inner: bool
    is_table: bool


_FACTS: weakref.WeakKeyDictionary[type, _ClassFacts] = weakref.WeakKeyDictionary()


@at_trace_time
def _facts_of(cls: type) -> _ClassFacts:
    found = _FACTS.get(cls)
    if found is None:
        attention = issubclass(cls, nn.MultiheadAttention)
        table = issubclass(cls, (nn.Embedding, nn.EmbeddingBag))
        found = _FACTS[cls] = _ClassFacts(refusal(cls), slots(cls), attention, table)
    return found


class _Copier:
    """One walk over the module tree."""

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Sequence[Attachment]],
        base_tensors: BaseTensors,
    ) -> None:
        bare = [a[-1] for a in sites.values() if KINDS[a[-1].site.kind].bare]
        if any(attachment.p is not None for attachment in bare):
            # a bound model's are under each of their names already, with slots of their own
            sites = everywhere(model, sites)
        self.sites = _by_module(sites)
        self.left = dict.fromkeys(self.sites)
        self.base_tensors = base_tensors
        self.copies: dict[int, Any] = {}
        self.referring: list[tuple[nn.Module, list[str]]] = []

    def visit(self, module: nn.Module, path: str, by_weight: bool) -> nn.Module:
        """The module's copy; with `by_weight` its adapters go into its weight, which isn't called."""
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
        prefix = path + "." if path else ""
        inner = ("out_proj",) if facts.has_inner and prefix + "out_proj" in self.sites else ()
        bounds = facts.is_table and module.__dict__.get("max_norm") is not None
        if attachments is None and not inner and not bounds:
            copy = _shallow(module, type(module), facts.slots)
        else:
            self.left.pop(path, None)
            copy = site_copy(module, path, attachments or {}, by_weight, inner, _shallow)
        self.copies[id(module)] = copy
        self.base_tensors(copy, path)
        if "_flat_weights" in copy.__dict__:
            flatten_again(copy)
        self._note_references(copy, path, facts.slots)
        if copy._modules:
            self._visit_children(copy, prefix, inner, attachments is not None)
        return copy

    def _visit_children(
        self, copy: nn.Module, prefix: str, inner: tuple[str, ...], is_site: bool
    ) -> None:
        before = len(self.left)
        children: dict[str, Any] = copy._modules
        for name, child in children.items():
            if child is not None:
                children[name] = self.visit(child, prefix + name, name in inner)
        if len(self.left) < before or is_site:
            _leave_fast_path(copy)

    def _note_references(self, copy: nn.Module, path: str, slots: tuple[str, ...]) -> None:
        """Note the attributes that may refer to modules of the original tree."""
        attributes = copy.__dict__
        first = _BASE_ATTRIBUTES if next(iter(attributes)) == "training" else 0
        names = [
            name
            for name, value in islice(attributes.items(), first, None)
            if type(value) not in PLAIN and name not in _OURS and refers(value)
        ]
        if slots:
            held = [name for name in slots if hasattr(copy, name)]
            names += [name for name in held if refers(getattr(copy, name))]
        forward = attributes.get("forward")
        if "_ll" in attributes and attributes["_ll"].own_forward is not None:
            forward = attributes["_ll"].own_forward
            names.append("_ll")
        if names:
            self.referring.append((copy, names))
        if forward is not None and not isinstance(forward, BINDABLE):
            raise UnsupportedError(
                f"{path!r}: its own `forward` is a {type(forward).__name__}, which may hold on "
                "to the original module; give the model as it was before that was put in"
            )

    def rebind(self) -> None:
        """What refers to modules of the original tree (bound forwards, lists of modules) refers to
        the copies.
        """
        for copy, names in self.referring:
            attributes = copy.__dict__
            for name in names:
                if name == "_ll":
                    state = attributes[name]
                    state.own_forward = rebound(state.own_forward, self.copies, 0)
                elif name in attributes:
                    attributes[name] = rebound(attributes[name], self.copies, 0)
                else:
                    object.__setattr__(copy, name, rebound(getattr(copy, name), self.copies, 0))


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
    """A new object of class `cls` with the module's attributes, its own dicts of tensors, children
    and hooks.
    """
    copy = object.__new__(cls)
    attributes = copy.__dict__
    attributes.update(module.__dict__)
    for name in kept:
        if hasattr(module, name):
            object.__setattr__(copy, name, getattr(module, name))
    for name in _TENSORS_AND_CHILDREN:
        attributes[name] = attributes[name].copy()
    for name in _HOOKS:  # own dicts: some models install hooks while they run
        attributes[name] = attributes[name].copy() if attributes[name] else OrderedDict()
    # own set: some models make masks while they run
    attributes["_non_persistent_buffers_set"] = attributes["_non_persistent_buffers_set"].copy()
    if "_compiled_call_impl" in attributes:  # `module.compile()` bound it to the original
        del attributes["_compiled_call_impl"]
    if "_ll" in attributes:  # a bound model's site
        attributes["_ll"] = replace(attributes["_ll"])
    return copy


def _leave_fast_path(copy: Any) -> None:
    """torch's fused encoder kernels read weights without calling the layers: with a site inside,
    take the other path.
    """
    if isinstance(copy, nn.TransformerEncoderLayer):
        copy.__dict__["activation_relu_or_gelu"] = 0
    elif isinstance(copy, nn.TransformerEncoder):
        copy.__dict__["use_nested_tensor"] = False


# ------------------------------------------------------------------------------- the base's tensors
class Constants:
    """What a copy holds in `apply`: the base's own tensors as constants, or those of `base` in
    their place.

    Args:
        base: {full name: tensor} to use instead of the model's own; gradients reach these.
    """

    def __init__(self, base: Mapping[str, Tensor]) -> None:
        self.grad = torch.is_grad_enabled()
        self.base = base

    def __call__(self, copy: nn.Module, path: str) -> None:
        parameters: dict[str, Any] = copy._parameters
        if copy._buffers and copy.training:
            own_buffers(copy)
        if not parameters and not self.base:
            return
        own_bias(copy)
        given = self._replace(copy, path) if self.base else ()
        if self.grad:
            for name, p in parameters.items():
                if p is not None and p.requires_grad and name not in given:
                    parameters[name] = constant(p, copy)

    def _replace(self, copy: nn.Module, path: str) -> set[str]:
        """Put those of `base` in; the names that it gave."""
        given = set()
        for tensors in (copy._parameters, copy._buffers):
            held: dict[str, Any] = tensors
            for name in held:
                found = self.base.get(f"{path}.{name}" if path else name)
                if found is not None:
                    held[name] = found
                    given.add(name)
        if "weight" in given and "_ll" in copy.__dict__:
            copy.__dict__["_ll"].rebased = True
        return given


def constant(parameter: Tensor, copy: nn.Module) -> Tensor:
    """A parameter's values without its gradient: the same storage."""
    if "_hf_hook" in copy.__dict__:  # accelerate rebuilds the parameter from its class
        return nn.Parameter(parameter.detach(), requires_grad=False)
    return parameter.detach()


def own_bias(copy: nn.Module) -> None:
    """A packed layer may cast its bias in place to what comes in (bitsandbytes): let it be a tensor
    of the copy's own.
    """
    parameters: dict[str, Any] = copy._parameters
    W, b = parameters.get("weight"), parameters.get("bias")
    if b is not None and W is not None and not W.is_floating_point():
        parameters["bias"] = b.detach()


def own_buffers(copy: nn.Module) -> None:
    """Clone what a forward in training mode may write in place: running statistics and counters,
    not packed weights.
    """
    buffers = copy._buffers
    for name, buffer in buffers.items():
        if buffer is not None and (buffer.is_floating_point() or buffer.numel() == 1):
            buffers[name] = buffer.clone()
