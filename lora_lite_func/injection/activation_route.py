"""The activation route: one adapter's phases around what is underneath, and what of them a prepared model makes once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.layout import unfolded
from ..core.site import Params, Site
from ..layers.kinds import KINDS
from .attachment import Attachment
from .frozen_layer import FrozenLayer
from .hidden_state import hidden_state
from .prepared import ready_at, stamped
from .prompt import tokens_of
from .rows_activation import by_rows, undisturbed
from .state import tensors_at
from .weight_view import enter, leave

__all__ = ["get_ready", "phases"]


def phases(
    attachments: Sequence[Attachment],
    count: int,
    frozen: Callable[[Tensor], Any],
    module: Any,
    x: Tensor,
) -> Any:
    """The layer as its first `count` adapters leave it; a later one is outside an earlier one, as
    merging in order would have it.

    Raises:
        UnsupportedError: the layer's call gives something else than a tensor.
        StructureError: a row's adapter is asked for, and the input's leading dimension isn't the
            rows.
    """
    if count == 0:
        return frozen(x)
    attachment = attachments[count - 1]
    variant, cfg, site = attachment.variant, attachment.cfg, attachment.site
    if attachment.row_plan is not None:
        return _rows(attachments, count, frozen, module, x)
    p, site = unfolded(tensors_at(attachment, module), site)
    d = None
    if variant.prepare is not None:
        ready = ready_at(attachment, module)
        d = (
            _prepare(attachments, count - 1, module, p, site, x.device.type)
            if ready is None
            else ready[0]
        )
    inner = x if variant.inputs is None else variant.inputs(cfg, p, d, x, site)
    y = frozen(inner) if count == 1 else phases(attachments, count - 1, frozen, module, inner)
    if variant.outputs is None:
        return y
    if KINDS[
        site.kind
    ].listed:  # a whole module: what comes to the phase is where its hidden state has the prompt
        h, put, x = _hidden(attachment, y, x)
        return put(variant.outputs(cfg, p, d, x, h, site))
    if not isinstance(y, Tensor):
        raise UnsupportedError(
            f"{site.path!r} ({type(module).__name__}): expected a tensor from the layer's call, "
            f"found {type(y).__name__}; leave it out "
            f"with exclude_names, or adapt its weight (target_parameters), or take a method that "
            f"changes the input alone (HRA)"
        )
    if attachment.dropout and module.training:
        x = F.dropout(x, attachment.dropout)
    return variant.outputs(cfg, p, d, x, y, site)


def _prepare(
    attachments: Sequence[Attachment], under: int, module: Any, p: Params, site: Site, device: str
) -> Any:
    """What a method's phases share, of the adapter with `under` others before it."""
    variant, cfg = attachments[under].variant, attachments[under].cfg
    assert variant.prepare is not None
    layer = FrozenLayer(attachments, under, module, p, phases)
    return undisturbed(device, variant.prepare, cfg, p, site, layer)


def get_ready(site: Any) -> None:
    """Make once what the phases of a bound site's adapters share, from its tensors as they are now."""
    made: dict[int, tuple[Any, Any]] = {}
    enter(site)
    try:
        for i, attachment in enumerate(site._ll_attachments):
            variant = attachment.variant
            if attachment.row_plan is not None or (
                variant.prepare is None and variant.low_rank_factors is None
            ):
                continue
            p, at = unfolded(tensors_at(attachment, site), attachment.site)
            d = (
                None
                if variant.prepare is None
                else _prepare(
                    site._ll_attachments, i, site, p, at, next(iter(p.values())).device.type
                )
            )
            factors = (
                None
                if variant.low_rank_factors is None
                else variant.low_rank_factors(attachment.cfg, p, at)
            )
            if d is not None or (
                factors is not None
                and not all(any(f is t for t in p.values()) for f in factors[:2])
            ):
                made[attachment.slot] = (
                    d,
                    factors,
                )  # not where the factors are the adapter's own tensors
    finally:
        leave(site)
    site.__dict__["_ll_ready"] = stamped(site, made)


def _rows(
    attachments: Sequence[Attachment],
    count: int,
    frozen: Callable[[Tensor], Any],
    module: Any,
    x: Tensor,
) -> Any:
    """`phases` where the outermost adapter is another one for each row."""
    attachment = attachments[count - 1]
    p = tensors_at(attachment, module)
    layer = FrozenLayer(attachments, count - 1, module, p, phases)
    return by_rows(
        attachment,
        p,
        layer,
        module.training,
        lambda x: phases(attachments, count - 1, frozen, module, x),
        _hidden,
        x,
    )


def _hidden(
    attachment: Attachment, y: Any, x: Tensor
) -> tuple[Tensor, Callable[[Tensor], Any], Tensor]:
    """(what the phase changes, how to put it back, what it gets for x) of a layer's output: of a
    whole module's its hidden state.
    """
    if not KINDS[attachment.site.kind].listed:
        return y, lambda h: h, x
    h, put = hidden_state(y, attachment.site.path, attachment.site.d_out)
    return h, put, tokens_of(h, attachment.prompt, attachment.site.path)
