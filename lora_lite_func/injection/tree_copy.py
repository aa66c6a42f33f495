"""A copy of the module tree, made for one call (or kept, for `bind`).

Every module of the copy is a new object of the same class with the same attributes; parameters and buffers are shared with the
user's model, never written. Nothing is cached between calls, so flags, dtypes, devices and replaced layers are always current.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn

from ..core.errors import StructureError, UnsupportedError
from ..layers.kinds import KINDS, module_and_name
from ..layers.refusals import check_model, refusal
from .attachment import Attachment
from .checks import check_site, check_substitutable, no_module
from .linear import only
from .references import BINDABLE, PLAIN, rebound, refers, slots
from .site_class import site_class
from .weight_route import flatten_again

__all__ = ["constant", "copy_tree", "own_bias", "own_buffers"]

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
_OURS = frozenset(
    {"_ll_bound", "_ll_inner", "_ll_only", "_ll_attachments", "_ll_path", "_ll_ready", "_ll_subs"}
)  # what a site carries: nothing of the original tree
_BASE_ATTRIBUTES = len(nn.Module().__dict__)

Own = Callable[[nn.Module, str], None]


def copy_tree(
    model: nn.Module, sites: Mapping[str, Sequence[Attachment]], own: Own | None = None
) -> nn.Module:
    """A copy of the module tree with the ops at their paths; `own(copy, path)` may replace the
    copy's parameters and buffers.

    Raises:
        StructureError: a site isn't there, has other dimensions, or is named twice through shared
            modules.
        UnsupportedError: it is no module, or an instance-level forward can't be re-bound to the
            copy.
    """
    check_model(model)
    copier = _Copier(sites, own)
    root = copier.visit(model, "", False)
    if copier.left:
        raise no_module(model, next(iter(copier.left)))
    copier.rebind()
    return root


class _Copier:
    """One walk over the module tree."""

    def __init__(self, sites: Mapping[str, Sequence[Attachment]], own: Own | None) -> None:
        self.sites: dict[
            str, dict[str, Sequence[Attachment]]
        ] = {}  # by module: "" for the module's own, else by tensor
        for path, attachments in sites.items():
            home, name = (
                module_and_name(attachments[-1].site)
                if KINDS[attachments[-1].site.kind].bare
                else (path, "")
            )
            self.sites.setdefault(home, {})[name] = attachments
        self.left = dict.fromkeys(self.sites)
        self.own = own
        self.copies: dict[int, Any] = {}
        self.referring: list[tuple[nn.Module, list[str]]] = []

    def visit(self, module: nn.Module, path: str, by_weight: bool) -> nn.Module:
        attachments = self.sites.get(path)
        copy = self.copies.get(id(module))
        if copy is not None:
            if attachments is None:
                return copy
            raise StructureError(
                f"site {path!r} is the same module as one at another path; name that one alone"
            )
        reason = refusal(type(module))
        if reason is not None:
            raise UnsupportedError(f"{path!r} ({type(module).__name__}) {reason}")
        prefix = path + "." if path else ""
        inner = (
            ("out_proj",)
            if isinstance(module, nn.MultiheadAttention) and prefix + "out_proj" in self.sites
            else ()
        )
        bounds = module.__dict__.get("max_norm") is not None and isinstance(
            module, (nn.Embedding, nn.EmbeddingBag)
        )
        if attachments is None and not inner and not bounds:
            copy = _shallow(module, type(module))
        else:
            self.left.pop(path, None)
            copy = _as_site(module, path, attachments or {}, by_weight, inner)
        self.copies[id(module)] = copy
        if self.own is not None:
            self.own(copy, path)
        flatten_again(copy)
        self._note_references(copy, path)
        children = copy._modules
        if children:
            before = len(self.left)
            for name, child in children.items():
                if child is not None:
                    children[name] = self.visit(child, prefix + name, name in inner)
            if len(self.left) < before or attachments is not None:
                _leave_fast_path(copy)
        return copy

    def _note_references(self, copy: nn.Module, path: str) -> None:
        attributes = copy.__dict__
        own = islice(
            attributes.items(),
            _BASE_ATTRIBUTES if next(iter(attributes)) == "training" else 0,
            None,
        )
        names = [
            name
            for name, value in own
            if type(value) not in PLAIN and name not in _OURS and refers(value)
        ]
        if "_ll_slots" in attributes:
            names += [
                name
                for name in attributes["_ll_slots"]
                if hasattr(copy, name) and refers(getattr(copy, name))
            ]
        if names:
            self.referring.append((copy, names))
        forward = (
            attributes.get("_ll_frozen") or attributes.get("_ll_own") or attributes.get("forward")
        )
        if forward is not None and not isinstance(forward, BINDABLE):
            raise UnsupportedError(
                f"{path!r}: its own `forward` is a {type(forward).__name__}, which may hold on "
                f"to the original module; "
                "give the model as it was before that was put in"
            )

    def rebind(self) -> None:
        """Attributes that refer to modules of the original tree (bound forwards, lists of modules)
        refer to the copies.
        """
        for copy, names in self.referring:
            attributes = copy.__dict__
            for name in names:
                if name in attributes:
                    attributes[name] = rebound(attributes[name], self.copies, 0)
                else:
                    object.__setattr__(copy, name, rebound(getattr(copy, name), self.copies, 0))


def _shallow(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A new object of class `cls` with the module's attributes, its own dicts of tensors, children
    and hooks.
    """
    copy = object.__new__(cls)
    attributes = copy.__dict__
    attributes.update(module.__dict__)
    kept = slots(cls)
    for name in kept:
        if hasattr(module, name):
            object.__setattr__(copy, name, getattr(module, name))
    if kept:
        attributes["_ll_slots"] = kept
    for name in _TENSORS_AND_CHILDREN:
        attributes[name] = attributes[name].copy()
    for name in _HOOKS:  # own dicts: some models install hooks while they run
        attributes[name] = attributes[name].copy() if attributes[name] else OrderedDict()
    attributes["_non_persistent_buffers_set"] = attributes[
        "_non_persistent_buffers_set"
    ].copy()  # or make masks then
    if "_compiled_call_impl" in attributes:  # `module.compile()` bound it to the original
        del attributes["_compiled_call_impl"]
    return copy


def _as_site(
    module: nn.Module,
    path: str,
    new: Mapping[str, Sequence[Attachment]],
    by_weight: bool,
    inner: tuple[str, ...],
) -> nn.Module:
    """The copy of a site, its ops behind those it has already (a bound model may be adapted again)."""
    for attachments in new.values():
        check_site(module, attachments[-1].site)
    had = module.__dict__
    base: type[nn.Module] = getattr(type(module), "_ll_base", type(module))
    attachments, subs = _routes(module, path, new, by_weight)
    inner = inner or had.get("_ll_inner", ())
    names = None
    if subs or inner:
        names = tuple(
            dict.fromkeys(
                n
                for name, chain in subs.items()
                for n in ((name,) if _bare(chain) else (name, "bias"))
            )
        )
    bounds = (
        module.__dict__.get("max_norm") is not None
    )  # torch's own call would write on the table
    lookup = isinstance(module, nn.Embedding) and not subs
    if bounds and not lookup:
        names = names or ()
    copy = _shallow(module, site_class(base, bool(attachments) or (bounds and lookup), names))
    attributes = copy.__dict__
    attributes.update(
        _ll_path=path,
        _ll_attachments=attachments,
        _ll_only=None,
        _ll_subs=subs,
        _ll_inner=inner,
        _ll_ready=None,
    )
    if (
        lookup and base is not nn.Embedding
    ):  # its phases are further down, around nn.Embedding's own forward
        return copy
    own = (
        attributes.pop("forward", None)
        or attributes.pop("_ll_frozen", None)
        or attributes.pop("_ll_own", None)
    )
    if own is not None:  # an instance-level forward would shadow the class's: it is the frozen call
        attributes["_ll_frozen" if names is None else "_ll_own"] = own
    else:
        attributes["_ll_only"] = only(attachments)
    return copy


def _bare(attachments: Sequence[Attachment]) -> bool:
    return KINDS[attachments[0].site.kind].bare


def _routes(
    module: Any, path: str, new: Mapping[str, Sequence[Attachment]], by_weight: bool
) -> tuple[tuple[Attachment, ...], dict[str, tuple[Attachment, ...]]]:
    """(ops whose phases go around the call, {tensor: ops that go by weight}), old ones first."""
    subs: dict[str, tuple[Attachment, ...]] = dict(module.__dict__.get("_ll_subs", {}))
    own = subs.get("weight", ())
    own = () if own and _bare(own) else own
    attachments = (*module.__dict__.get("_ll_attachments", ()), *own, *new.get("", ()))
    if attachments and (
        own
        or by_weight
        or KINDS[attachments[0].site.kind].by_weight(module)
        or any(not attachment.variant.has_phases for attachment in attachments)
    ):
        subs["weight"], attachments = attachments, ()
    for name, chain in new.items():
        if name:
            if name in ("weight", "bias") and (
                attachments or (subs.get("weight") and not _bare(subs["weight"]))
            ):
                raise UnsupportedError(
                    f"{path + '.' + name!r} is adapted as a bare parameter and with its layer "
                    f"{path!r}; choose one of the two"
                )
            subs[name] = (*subs.get(name, ()), *chain)
    for name in subs:
        check_substitutable(module, path, name)
    return attachments, subs


def _leave_fast_path(copy: Any) -> None:
    """torch's fused encoder kernels read weights without calling the layers: with a site inside,
    take the other path.
    """
    if isinstance(copy, nn.TransformerEncoderLayer):
        copy.__dict__["activation_relu_or_gelu"] = 0
    elif isinstance(copy, nn.TransformerEncoder):
        copy.__dict__["use_nested_tensor"] = False


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
