"""What an adapter puts in front of each row of a batch, and how many places of it a row uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.site import Params
from ..core.stacked import LENGTH, PRESENT, unfolded
from ..kernels.row_plan import RowPlan
from ..layers.whole_calls import predicts_next
from .attachment import Attachment, ids_of_rows
from .rows_activation import mapped
from .state import tensors_at
from .virtual_front import Front

__all__ = ["decoder_values_of", "front_of", "label_weights_of", "labels_of", "values_of"]

_STANDS = "stands in front of whole rows"


def values_of(attachment: Attachment, module: Any, rows: int) -> Tensor:
    """What stands in front of each row, (N, *what the method's `virtual` gives).

    Args:
        attachment: the method at the site.
        module: the site.
        rows: N.
    """
    virtual = attachment.variant.virtual
    assert virtual is not None
    return _of_rows(virtual, attachment, module, rows)


def decoder_values_of(attachment: Attachment, module: Any, rows: int) -> Tensor:
    """What stands in front of each row that is decoded, (N, P, width)."""
    virtual = attachment.variant.decoder_tokens_of(attachment.cfg)
    assert virtual is not None
    return _of_rows(virtual, attachment, module, rows)


def labels_of(attachment: Attachment, module: Any, rows: int) -> Tensor | None:
    """The labels of virtual tokens, (N, P), -100 where a row doesn't use the place; None where no
    token has one.
    """
    labels = attachment.variant.virtual_labels
    if labels is None:
        return None
    made = _of_rows(labels, attachment, module, rows)
    if predicts_next(module):  # nothing comes before the first, also where a row uses fewer places
        made = torch.cat([torch.full_like(made[:, :1], -100), made[:, 1:]], dim=1)
    lengths = front_of(attachment, module, rows).lengths
    if lengths is None:
        return made
    place = torch.arange(made.shape[1], device=made.device)
    return torch.where(place < lengths[:, None], made, -100)


def label_weights_of(attachment: Attachment, module: Any, rows: int) -> Tensor | None:
    """By how much the loss counts the labels of virtual tokens, (N, P); None where as any other."""
    weights = attachment.variant.label_weights_of(attachment.cfg)
    return None if weights is None else _of_rows(weights, attachment, module, rows)


def _of_rows(
    function: Callable[..., Tensor], attachment: Attachment, module: Any, rows: int
) -> Tensor:
    """What a method's function gives for each row."""

    def one(p: Params) -> Tensor:
        q, site = unfolded(p, attachment.site)
        return function(attachment.cfg, q, site)

    p = tensors_at(attachment, module)
    if attachment.row_plan is None:
        made = one(p)
        return made.expand(rows, *made.shape)
    ids = ids_of_rows(attachment, rows, _STANDS).to(_any(p).device).clamp(min=0)
    return mapped(one, p).index_select(0, ids)


def front_of(attachment: Attachment, module: Any, rows: int) -> Front:
    """Where an adapter's virtual tokens stand in a batch of N rows.

    Raises:
        StructureError: the batch hasn't as many rows as have adapters.
        UnsupportedError: each token has an adapter of its own.
    """
    p = tensors_at(attachment, module)
    return Front(attachment.site.r, _lengths(attachment, p, rows))


def _lengths(attachment: Attachment, p: Params, rows: int) -> Tensor | None:
    """How many places each row uses, (N,) int64; None where every row uses all."""
    plan = attachment.row_plan
    if plan is None:
        if LENGTH not in p and PRESENT not in p:
            return None
        first = _any(p)
        length = p.get(LENGTH, first.new_tensor(float(attachment.site.r)))
        length = length * p[PRESENT] if PRESENT in p else length
        return length.long().expand(rows)
    ids = ids_of_rows(attachment, rows, _STANDS)
    known = plan.known_ids if isinstance(plan, RowPlan) else None
    if LENGTH not in p and known is not None and min(known, default=0) >= 0:
        return None
    device = _any(p).device
    of_member = p.get(LENGTH, torch.full((plan.members,), attachment.site.r, device=device))
    ids = ids.to(device)
    return torch.where(ids < 0, 0, of_member.index_select(0, ids.clamp(min=0)).long())


def _any(p: Params) -> Tensor:
    """One of the tensors."""
    return next(iter(p.values()))
