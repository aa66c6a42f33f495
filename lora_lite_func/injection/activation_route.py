"""The activation route: one adapter's phases around what is underneath, and what of them a prepared model makes once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .batching import by_rows, undisturbed
from .errors import UnsupportedError
from .hidden import hidden_state, tokens_of
from .kinds import KINDS
from .ops import Op, tensors_at, unfolded
from .reading import enter, leave
from .ready import ready_at, stamped
from .spec import Params, Site
from .underneath import Underneath

__all__ = ["get_ready", "phases"]


def phases(ops: Sequence[Op], count: int, frozen: Callable[[Tensor], Any], module: Any, x: Tensor) -> Any:
    """The layer as its first `count` adapters leave it; a later one is outside an earlier one, as merging in order would have it.

    Raises:
        UnsupportedError: the layer's call gives something else than a tensor.
        StructureError: a row's adapter is asked for, and the input's leading dimension isn't the rows.
    """
    if count == 0:
        return frozen(x)
    op = ops[count - 1]
    variant, cfg, site = op.variant, op.cfg, op.site
    if op.plan is not None:
        return _rows(ops, count, frozen, module, x)
    p, site = unfolded(tensors_at(op, module), site)
    d = None
    if variant.prepare is not None:
        ready = ready_at(op, module)
        d = _prepare(ops, count - 1, module, p, site, x.device.type) if ready is None else ready[0]
    inner = x if variant.inputs is None else variant.inputs(cfg, p, d, x, site)
    y = frozen(inner) if count == 1 else phases(ops, count - 1, frozen, module, inner)
    if variant.outputs is None:
        return y
    if KINDS[site.kind].listed:  # a whole module: what comes to the phase is where its hidden state has the prompt
        h, put, x = _hidden(op, y, x)
        return put(variant.outputs(cfg, p, d, x, h, site))
    if not isinstance(y, Tensor):
        raise UnsupportedError(
            f"{site.path!r} ({type(module).__name__}): expected a tensor from the layer's call, found {type(y).__name__}; leave it out "
            f"with exclude_names, or adapt its weight (target_parameters), or take a method that changes the input alone (HRA)"
        )
    if op.dropout and module.training:
        x = F.dropout(x, op.dropout)
    return variant.outputs(cfg, p, d, x, y, site)


def _prepare(ops: Sequence[Op], under: int, module: Any, p: Params, site: Site, device: str) -> Any:
    """What a method's phases share, of the adapter with `under` others before it."""
    op = ops[under]
    return undisturbed(device, op.variant.prepare, op.cfg, p, site, Underneath(ops, under, module, p, phases))  # type: ignore[arg-type]


def get_ready(site: Any) -> None:
    """Make once what the phases of a bound site's adapters share, from its tensors as they are now."""
    made: dict[int, tuple[Any, Any]] = {}
    enter(site)
    try:
        for i, op in enumerate(site._ll_ops):
            variant = op.variant
            if op.plan is not None or (variant.prepare is None and variant.factors is None):
                continue
            p, at = unfolded(tensors_at(op, site), op.site)
            d = None if variant.prepare is None else _prepare(site._ll_ops, i, site, p, at, next(iter(p.values())).device.type)
            factors = None if variant.factors is None else variant.factors(op.cfg, p, at)
            if d is not None or (factors is not None and not all(any(f is t for t in p.values()) for f in factors[:2])):
                made[op.slot] = (d, factors)  # not where the factors are the adapter's own tensors
    finally:
        leave(site)
    site.__dict__["_ll_ready"] = stamped(site, made)


def _rows(ops: Sequence[Op], count: int, frozen: Callable[[Tensor], Any], module: Any, x: Tensor) -> Any:
    """`phases` where the outermost adapter is another one for each row."""
    op = ops[count - 1]
    p = tensors_at(op, module)
    layer = Underneath(ops, count - 1, module, p, phases)
    return by_rows(op, p, layer, module.training, lambda x: phases(ops, count - 1, frozen, module, x), _hidden, x)


def _hidden(op: Op, y: Any, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Any], Tensor]:
    """(what the phase changes, how to put it back, what it gets for x) of a layer's output: of a whole module's its hidden state."""
    if not KINDS[op.site.kind].listed:
        return y, lambda h: h, x
    h, put = hidden_state(y, op.site.path, op.site.d_out)
    return h, put, tokens_of(h, op.prompt, op.site.path)
