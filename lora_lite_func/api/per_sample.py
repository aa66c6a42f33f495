"""A gradient for each sample of a batch, in one pass: the batch as rows of one adapter expanded to N members."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..algebra.rows import rows
from ..algebra.tree import check_adapter, combine, partition
from ..core.adapter import Adapter, check_shapes
from ..core.errors import StructureError
from .apply import apply
from .calibrate import arguments

__all__ = ["per_sample_grads"]


def per_sample_grads(
    model: nn.Module, params: Adapter, loss_fn: Callable[[Any, Any], Tensor], batch: Any
) -> Adapter:
    """The gradient of each sample's loss in the adapter's trainable leaves, as a stack of N: exact,
    the base runs once on the batch.

    Frozen leaves are absent. Samples must not meet inside the model (batch norm in training mode).

    Args:
        model: the frozen base.
        params: one adapter.
        loss_fn: (output, batch) -> (N,), a loss per sample (`reduction="none"`).
        batch: a tensor, a mapping of keywords, or a tuple whose first item is what the model takes,
            such as (input, target).

    Raises:
        StructureError: the loss isn't one number per sample, or the batch holds no tensor.
        UnsupportedError: rows can't have adapters of their own at a site: they meet in it, or its
            weight is read without a call.
    """
    check_adapter(params, "per_sample_grads")
    check_shapes(params)
    args, kwargs = arguments(model, batch, True)
    count = _samples((args, kwargs))
    trainable, frozen = (
        pytree.tree_map(lambda t: t.detach().expand(count, *t.shape), part)
        for part in partition(params)
    )
    with torch.enable_grad():
        live = pytree.tree_map(lambda t: t.requires_grad_(), trainable)
        y = apply(model, rows(combine(live, frozen), range(count)), *args, **kwargs)
        losses = loss_fn(y, batch)
        if not isinstance(losses, Tensor) or tuple(losses.shape) != (count,):
            found = (
                f"shape {tuple(losses.shape)}"
                if isinstance(losses, Tensor)
                else type(losses).__name__
            )
            raise StructureError(
                f"per_sample_grads: expected a loss per sample, ({count},), found {found}; give "
                f"reduction='none'"
            )
        leaves, form = pytree.tree_flatten(live)
        return pytree.tree_unflatten(
            torch.autograd.grad(losses.sum(), leaves, materialize_grads=True), form
        )


def _samples(arguments: Any) -> int:
    found = next(
        (t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor) and t.ndim), None
    )
    if found is None:
        raise StructureError("per_sample_grads: the batch holds no tensor to count samples by")
    return found.shape[0]
