"""The copy of a site, which route each of its adapters takes, and the state that it carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..core.errors import UnsupportedError
from ..layers.kinds import KINDS, misfit
from ..layers.sharded import ADAPTED_ITSELF, check_parallel
from .attachment import Attachment
from .attention_site import turn_to_adapters
from .called_linears import uncalled
from .checks import check_site, check_substitutable
from .linear import choose
from .prompt_scope import under_scope
from .site_class import site_class
from .state import SiteState

__all__ = ["Make", "site_copy"]

Make = Callable[[nn.Module, type[nn.Module], tuple[str, ...]], nn.Module]
"""Takes (module, class, its slots), and copies the module to an object of the class."""


def site_copy(
    module: nn.Module,
    path: str,
    new: Mapping[str, Sequence[Attachment]],
    by_weight: bool,
    inner: tuple[str, ...],
    kept: tuple[str, ...],
    make: Make,
) -> nn.Module:
    """The copy of a site with new adapters.

    They come after those that it has already, as a bound model may be adapted again.

    Args:
        module: the layer.
        path: its path.
        new: {"" for the layer, else the name of a bare tensor: adapters}.
        by_weight: whether the layer isn't called, so that its adapters go into its weight.
        inner: its children whose tensors are substituted in its own call.
        kept: the attributes that its class keeps in slots.
        make: makes the copy.

    Raises:
        StructureError: the layer isn't what an adapter was made for.
        UnsupportedError: a tensor would have to be substituted and can't be.
    """
    for attachments in new.values():
        if misfit(attachments[-1].site, module) is not None:
            check_site(module, attachments[-1].site)
    had: SiteState = module.__dict__.get("_ll") or _BARE
    substituted: dict[str, tuple[Attachment, ...]] = {}
    if had is _BARE and not by_weight and len(new) == 1 and _goes_around(module, new.get("", ())):
        attachments = tuple(new[""])
    else:
        attachments, substituted = _routes(module, path, had, new, by_weight)
    called = any(attachment.called for attachment in attachments)
    if attachments:
        around = attachments[0].site.kind == "linear" and not called
        check_parallel(module, path, why=None if around else ADAPTED_ITSELF)
    inner = inner or had.inner
    names = _substituted_names(substituted) if substituted or inner else None
    # Where the table's norms are bounded, torch's call would write on the table.
    bounds = module.__dict__.get("max_norm") is not None
    looks_up = isinstance(module, nn.Embedding) and not substituted
    if bounds and not looks_up:
        names = names or ()
    cls: Any = type(module)
    base: type[nn.Module] = under_scope(cls) if had is _BARE else cls._ll_base
    attends = any(KINDS[attachment.site.kind].attends for attachment in attachments)
    if attends and not all(KINDS[attachment.site.kind].attends for attachment in attachments):
        raise UnsupportedError(
            f"{path!r} is adapted inside its attention and as a whole module; choose one of the two"
        )
    active = (len(attachments) > 0 and not attends) or (bounds and looks_up)
    whole_call = any(KINDS[attachment.site.kind].called for attachment in attachments)
    copy = make(module, site_class(base, active, names, called, whole_call), kept)
    state = SiteState(path, attachments, substituted, inner, own_forward=had.own_forward)
    copy.__dict__["_ll"] = state
    if attends:
        turn_to_adapters(copy)
    if looks_up and base is not nn.Embedding:
        # The phases are further down, around nn.Embedding's own forward.
        return copy
    # A forward on the instance would shadow the class's, so it is kept as the layer's call.
    own = None
    for name in ("_ll_forward", "forward"):
        if name in copy.__dict__:
            own = copy.__dict__.pop(name)
    state.own_forward = own or had.own_forward
    if state.own_forward is None:
        state.step = choose(attachments)
    return copy


_BARE = SiteState("")
"""What a layer without adapters carries; it is never written on."""


def _substituted_names(substituted: Mapping[str, Sequence[Attachment]]) -> tuple[str, ...]:
    """The names of the tensors that are substituted.

    The biases of layers are among them, because a method may move a bias.
    """
    names: dict[str, None] = {}
    for name, attachments in substituted.items():
        names[name] = None
        if not _bare(attachments):
            names["bias"] = None
    return tuple(names)


def _goes_around(module: nn.Module, attachments: Sequence[Attachment]) -> bool:
    """Whether a layer has new adapters, and the phases of all of them can go around its call."""
    for attachment in attachments:
        goes_by_weight = KINDS[attachment.site.kind].by_weight
        if goes_by_weight is not None and goes_by_weight(module):
            return False
        if not attachment.variant.has_phases:
            return False
    return len(attachments) > 0


def _bare(attachments: Sequence[Attachment]) -> bool:
    return KINDS[attachments[0].site.kind].bare


def _routes(
    module: Any,
    path: str,
    had: SiteState,
    new: Mapping[str, Sequence[Attachment]],
    by_weight: bool,
) -> tuple[tuple[Attachment, ...], dict[str, tuple[Attachment, ...]]]:
    """(adapters whose phases go around the call, {tensor: adapters that go into it}).

    In each, the adapters that the site has already come first.
    """
    substituted = dict(had.substituted)
    own = substituted.get("weight", ())
    own = () if own and _bare(own) else own
    attachments = (*had.attachments, *own, *new.get("", ()))
    if attachments:
        goes_by_weight = KINDS[attachments[0].site.kind].by_weight
        by_weight = (
            by_weight or len(own) > 0 or (goes_by_weight is not None and goes_by_weight(module))
        )
        for attachment in attachments:
            by_weight = by_weight or not attachment.variant.has_phases
        if by_weight:
            if any(attachment.called for attachment in attachments):
                raise uncalled(path)
            substituted["weight"], attachments = attachments, ()
    for name, chain in new.items():
        if not name:
            continue
        layers_own = substituted.get("weight", ())
        with_layer = attachments or (layers_own and not _bare(layers_own))
        if name in ("weight", "bias") and with_layer:
            raise UnsupportedError(
                f"{path + '.' + name!r} is adapted as a bare parameter and with its layer "
                f"{path!r}; choose one of the two"
            )
        substituted[name] = (*substituted.get(name, ()), *chain)
    for name in substituted:
        check_substitutable(module, path, name)
    return attachments, substituted
