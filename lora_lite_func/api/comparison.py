"""Running a model on an example several times, and how far apart two outputs are."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["allowed", "apart", "run"]

_DEEP = 6


def run(tree: nn.Module, example: Any) -> Any:
    """The output of a module on a copy of the example, (args, kwargs)."""
    args, kwargs = _fresh(example)
    return tree(*args, **kwargs)


def _fresh(value: Any) -> Any:
    """A copy of the example, because a model may write on its inputs or fill a cache."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if type(value) in (list, tuple):
        return type(value)(map(_fresh, value))
    if type(value) is dict:
        return {k: _fresh(v) for k, v in value.items()}
    try:
        return copy.deepcopy(value)
    except Exception:
        # What can't be copied is given as it is.
        return value


def allowed(eps: float, size: float) -> float:
    """The difference that is allowed for values of a size: half the digits of a dtype."""
    return float(eps**0.5 * max(1.0, size))


def apart(a: Any, b: Any) -> tuple[float, float, float]:
    """(largest difference, largest magnitude, coarsest eps) over the floating tensors of two trees.

    The two have the same structure. The magnitude is below 0 if they hold no such tensor.
    """
    difference, size, eps = 0.0, -1.0, 0.0
    mine, theirs = list(_tensors(a)), list(_tensors(b))
    if len(mine) != len(theirs):
        return math.inf, 0.0, eps
    for u, v in zip(mine, theirs, strict=True):
        eps = max(eps, torch.finfo(u.dtype).eps)
        wide = torch.promote_types(u.dtype, torch.float64)
        u, v = u.detach().to("cpu", wide), v.detach().to("cpu", wide)
        if u.shape != v.shape:
            return math.inf, max(size, 0.0), eps
        same = (u == v) | (u.isnan() & v.isnan())
        gap = torch.where(same, 0.0, (u - v).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
        finite = torch.where(v.isfinite(), v.abs(), 0.0)
        difference = max(difference, gap.max().item() if gap.numel() else 0.0)
        size = max(size, finite.max().item() if finite.numel() else 0.0)
    return difference, size, eps


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The floating and complex tensors with values in an output.

    The output may hold mappings, sequences, dataclasses and plain objects.
    """
    if isinstance(value, Tensor):
        if (value.is_floating_point() or value.is_complex()) and not value.is_meta:
            yield value
    elif depth < _DEEP:
        if isinstance(value, Mapping):
            items: Any = value.values()
        elif isinstance(value, (list, tuple, set)):
            items = value
        else:
            items = (
                vars(value).values()
                if hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module))
                else ()
            )
        for item in items:
            yield from _tensors(item, depth + 1)
