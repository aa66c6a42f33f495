"""The phases of adapters around what is underneath, and what `prepare` makes for them.

A site's call comes here from activation_route.py, which has checked its input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedError
from ..core.site import Params, Site
from ..core.stacked import PRESENT, SCALING, unfolded
from ..core.torch_internals import first_of, is_sharded, is_traced, without_autocast
from ..kernels.dropout import dropped
from ..kernels.mixture import Mixture
from ..layers.kinds import KINDS
from .attachment import Attachment, is_here
from .called_linears import called_outputs
from .frozen_layer import FrozenLayer
from .hidden_state import hidden_state
from .mixed_activation import by_weights
from .prepared import Made, keep, ready_of
from .prompt import tokens_of
from .rows_activation import by_rows
from .sharded_call import prepared_whole
from .stand_in import on_stand_in
from .state import leaves_at, tensors_at, tensors_of

__all__ = ["get_ready", "phases"]


def phases(
    attachments: Sequence[Attachment],
    count: int,
    frozen: Callable[[Tensor], Any],
    module: Any,
    x: Tensor,
) -> Any:
    """The layer's output with its first `count` adapters in.

    A later adapter is outside an earlier one, as merging in order would have it.

    Raises:
        UnsupportedError: the layer's call gives something else than a tensor.
        StructureError: rows have adapters of their own, and the input's leading dimension isn't the
            rows.
    """
    if count == 0:
        return frozen(x)
    attachment = attachments[count - 1]
    variant, cfg, site = attachment.variant, attachment.cfg, attachment.site
    if attachment.row_plan is not None:
        return _rows(attachments, count, frozen, module, x)
    p, ready = attachment.p, None
    if p is None:
        leaves = leaves_at(module, attachment.slot)
        ready = None if module.training else ready_of(leaves)
        p = tensors_of(leaves)
    here = is_here(attachment, p) if attachment.optional else None
    if SCALING in p or PRESENT in p or torch.compiler.is_dynamo_compiling():
        p, site = unfolded(p, site)
    d = None
    if variant.prepare is not None:
        if ready is None:
            d = _prepare(attachments, count - 1, module, p, site, x.device.type)
        else:
            d = ready.d
    inner = x if variant.inputs is None else _chosen(here, variant.inputs(cfg, p, d, x, site), x)
    y = frozen(inner) if count == 1 else phases(attachments, count - 1, frozen, module, inner)
    if variant.outputs is None:
        return y
    # The phase of a whole module gets, for x, where the hidden state has the prompt.
    if KINDS[site.kind].listed:
        h, put, x = _hidden(module, attachment, y, x)
        return put(_chosen(here, variant.outputs(cfg, p, d, x, h, site), h))
    _check_output(y, site, module)
    if attachment.dropout and module.training:
        x = dropped(x, attachment.dropout)
    if attachment.seen is not None:
        assert variant.router is not None
        attachment.seen.add(site.path, variant.router(cfg, p, d, x, site))
    if attachment.called:
        made = called_outputs(attachment, leaves_at(module, attachment.slot), p, d, x, y, site)
    else:
        made = variant.outputs(cfg, p, d, x, y, site)
    return _chosen(here, made, y)


def _chosen(here: Tensor | None, changed: Tensor, t: Tensor) -> Tensor:
    """What a phase made of t, or t itself where the adapter isn't here."""
    return changed if here is None else torch.where(here, changed, t)


def _check_output(y: Any, site: Site, module: Any) -> None:
    """Refuse what a layer of a class of its own gives, if it isn't its product with the weight.

    Raises:
        UnsupportedError: it is no tensor, or a linear layer's isn't (..., d_out).
    """
    if not isinstance(y, Tensor):
        expected, found = "a tensor", type(y).__name__
    elif (
        site.kind != "linear"
        or is_traced()
        or y.shape[-1:] == (site.d_out,)
        or getattr(type(module), "_ll_base", type(module)) is nn.Linear
    ):
        return
    else:
        expected, found = f"(..., {site.d_out})", f"{tuple(y.shape)} (a product by groups?)"
    raise UnsupportedError(
        f"{site.path!r} ({type(module).__name__}): expected {expected} from the layer's call, "
        f"found {found}; leave it out with exclude_names, or adapt its weight "
        f"(target_parameters), or take a method that changes the input alone (HRA)"
    )


def _prepare(
    attachments: Sequence[Attachment], under: int, module: Any, p: Params, site: Site, device: str
) -> Any:
    """What `prepare` gives for the adapter that has `under` others before it."""
    variant, cfg = attachments[under].variant, attachments[under].cfg
    made_of = variant.prepare
    assert made_of is not None

    def prepare(p: Params) -> Any:
        layer = FrozenLayer(attachments, under, module, p, phases)
        return without_autocast(device, made_of, cfg, p, site, layer)

    if is_sharded(first_of(iter(p.values()), None)):
        return prepared_whole(p, prepare)
    return prepare(p)


def get_ready(site: Any) -> None:
    """Make once what a bound site's adapters need in every call, from their present tensors."""
    keep(site, on_stand_in(site, site._ll_base, lambda layer, call: _all_made(layer)))


def _all_made(layer: Any) -> dict[str, Made]:
    made = {}
    for i, attachment in enumerate(layer._ll.attachments):
        one = None if attachment.row_plan is not None else _made(layer, i, attachment)
        if one is not None:
            made[attachment.slot] = one
    return made


def _made(site: Any, under: int, attachment: Attachment) -> Made | None:
    """What one adapter needs in every call; None where that is its own tensors."""
    variant = attachment.variant
    p, at = unfolded(tensors_at(attachment, site), attachment.site)
    device = next(iter(p.values())).device.type
    d = factors = None
    if variant.prepare is not None:
        d = _prepare(site._ll.attachments, under, site, p, at, device)
    if variant.low_rank_factors is not None:
        factors = without_autocast(device, variant.low_rank_factors, attachment.cfg, p, at)
        if all(any(factor is t for t in p.values()) for factor in factors[:2]):
            factors = None
    return None if d is None and factors is None else Made(d, factors)


def _rows(
    attachments: Sequence[Attachment],
    count: int,
    frozen: Callable[[Tensor], Any],
    module: Any,
    x: Tensor,
) -> Any:
    """`phases` where each row has an outermost adapter of its own, or a mixture of several."""
    attachment = attachments[count - 1]
    p, plan = tensors_at(attachment, module), attachment.row_plan
    layer = FrozenLayer(attachments, count - 1, module, p, phases)

    def inner(x: Tensor) -> Any:
        return phases(attachments, count - 1, frozen, module, x)

    if isinstance(plan, Mixture):
        return by_weights(attachment, plan, p, layer, module.training, inner, x)
    hidden = functools.partial(_hidden, module)
    return by_rows(attachment, p, layer, module.training, inner, hidden, x)


def _hidden(
    module: Any, attachment: Attachment, y: Any, x: Tensor
) -> tuple[Tensor, Callable[[Tensor], Any], Tensor]:
    """(what the phase changes, how to put it back, what it gets for x), from a layer's output.

    Of a whole module, the phase changes the hidden state in its output.
    """
    if not KINDS[attachment.site.kind].listed:
        _check_output(y, attachment.site, module)
        return y, lambda h: h, x
    h, put = hidden_state(y, attachment.site.path, attachment.site.d_out)
    prompt = attachment.prompt or module.__dict__.get("_ll_prompt")
    return h, put, tokens_of(h, prompt, attachment.site.path)
