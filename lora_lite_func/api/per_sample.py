"""Per-sample gradients: the base runs once on the batch, and each row has leaves of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..algebra.alike import map_adapters
from ..algebra.gradients import grad
from ..algebra.partition import combine, partition
from ..algebra.rows import rows
from ..core.adapter import Adapter
from ..core.adapter_shapes import check_shapes
from ..core.arguments import function
from ..core.errors import StructureError
from ..core.torch_internals import first_of
from ..layers.refusals import check_model
from .apply import apply
from .batches import arguments

__all__ = ["per_sample_grads"]


def per_sample_grads(
    model: nn.Module, params: Any, loss_fn: Callable[[Any, Any], Tensor], batch: Any
) -> Any:
    """The gradient of each sample's loss in the adapter's trainable leaves, as a stack of N.

    Exact, and the base runs once on the batch. Frozen leaves are absent. Samples must not meet
    inside the model (batch norm in training mode). Works inside every transform of torch.func and
    in compiled functions.

    Args:
        model: the frozen base.
        params: one adapter, or a tuple, list or dict of them.
        loss_fn: (output, batch) -> (N,), a loss per sample (`reduction="none"`).
        batch: a tensor, a mapping of keywords, or a tuple whose first item is what the model takes,
            such as (input, target).

    Returns:
        A stack like `params`, each leaf (N, ...); a tuple, list or dict of stacks for such.

    Raises:
        StructureError: the loss isn't one number per sample, or the batch holds no tensor.
        UnsupportedError: rows can't have adapters of their own at a site: they meet in it, or its
            weight is read without a call.
    """
    map_adapters(check_shapes, params, "per_sample_grads")
    check_model(model)
    function(loss_fn, "per_sample_grads: loss_fn")
    args, kwargs = arguments(model, batch, True)
    count = _samples((args, kwargs))

    def each(t: Tensor) -> Tensor:
        return t.expand(count, *t.shape)

    def total(live: Any, frozen: Any) -> Tensor:
        def of_rows(live: Adapter, frozen: Adapter) -> Any:
            return rows(combine(live, frozen), range(count))

        y = apply(model, map_adapters(of_rows, live, "per_sample_grads", frozen), *args, **kwargs)
        losses = loss_fn(y, batch)
        _check_losses(losses, count)
        return losses.sum()

    trainable, frozen = (pytree.tree_map(each, part) for part in partition(params))
    return grad(total)(trainable, frozen)


def _check_losses(losses: Any, count: int) -> None:
    if isinstance(losses, Tensor) and tuple(losses.shape) == (count,):
        return
    found = type(losses).__name__
    if isinstance(losses, Tensor):
        found = f"shape {tuple(losses.shape)}"
    raise StructureError(
        f"per_sample_grads: expected a loss per sample, ({count},), found {found}; give "
        f"reduction='none'"
    )


def _samples(arguments: Any) -> int:
    found = first_of(
        (t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor) and t.ndim), None
    )
    if found is None:
        raise StructureError("per_sample_grads: the batch holds no tensor to count samples by")
    return found.shape[0]
