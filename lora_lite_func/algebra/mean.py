"""The average of a stack's members, leaf by leaf."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.absent import ABSENT
from ..core.adapter import Adapter, count_members, rebuild
from ..core.errors import StructureError, short_repr
from ..core.stacked import Stacked
from ..core.torch_internals import is_tracing_here, is_transformed

__all__ = ["mean"]


def mean(stack: Adapter, weights: Tensor | Sequence[float] | None = None) -> Adapter:
    """One adapter whose leaves are the average of a stack's members' (a model soup, Wortsman et al.
    2022, arXiv 2203.05482; averages of checkpoints).

    Leaf by leaf: of a product of factors it is the product of the averages, not the average of the
    updates, which `ll.combine_adapters(ll.unstack(stack), [1 / K] * K)` gives. Differentiable in
    the stack and in weights that are a tensor.

    Args:
        stack: K adapters; ranks may differ (the shorter ones' zeros count), strengths may not.
        weights: (K,), taken as they are: give ones that sum to 1 for an average. 1 / K by default.

    Raises:
        StructureError: not a stack, weights that aren't one finite number per member, members of
            different strengths or sites, or frozen leaves that differ and so have no average.
    """
    count = count_members(stack, "mean")
    w = _weights(weights, count)
    layout = stack.layout.alone() if isinstance(stack.layout, Stacked) else stack.layout
    if isinstance(stack.layout, Stacked):
        _check_sites(stack.layout)
    if layout is None:
        raise StructureError(
            "mean: the members' strengths differ (alpha / r); average their updates, "
            "ll.combine_adapters(ll.unstack(stack), weights)"
        )
    made: list[Any] = []
    for path, names in stack.layout.names.items():
        for name in names:
            t = stack._data[path][name]
            if t is ABSENT:
                made.append(ABSENT)
            elif stack.layout.specs[path][name].trainable:
                made.append(_average(t, w))
            else:
                made.append(_common(t, path, name))
    return rebuild(layout, made)


def _check_sites(layout: Stacked) -> None:
    for path in layout.sites:
        lacking = layout.lacking(path)
        if lacking:
            raise StructureError(
                f"mean: member {min(lacking)} has no site {path!r}, so its leaves have no average; "
                f"average the updates, ll.combine_adapters(ll.unstack(stack), weights)"
            )


def _average(t: Tensor, w: Tensor | None) -> Tensor:
    if w is None:
        return t.mean(0)
    return torch.tensordot(w.to(device=t.device, dtype=t.dtype), t, dims=1)


def _common(t: Tensor, path: str, name: str) -> Tensor:
    """The frozen tensor that all members share."""
    known = not (is_transformed() or is_tracing_here())  # else the values are data of a graph
    if known and t.shape[0] > 1 and bool((t[1:] != t[:1]).any()):
        raise StructureError(
            f"mean: {path!r} {name} is frozen and differs among the members, so their average is "
            f"no adapter of that start; average adapters of one seed and start, or the updates "
            f"(ll.combine_adapters)"
        )
    return t[0]


def _weights(weights: Any, count: int) -> Tensor | None:
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        try:
            numbers = [float(w) for w in weights]
        except (TypeError, ValueError):
            numbers = [math.nan]
        if not all(map(math.isfinite, numbers)):
            raise StructureError(
                f"mean: weights: expected {count} finite numbers, found {short_repr(weights)}"
            )
        weights = torch.tensor(numbers, dtype=torch.float64)
    if tuple(weights.shape) != (count,) or not weights.is_floating_point():
        raise StructureError(
            f"mean: weights: expected ({count},), one per member, found {weights.dtype} of shape "
            f"{tuple(weights.shape)}"
        )
    return weights
