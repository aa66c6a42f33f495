"""An adapter's update at a site as a pair of factors, whatever the method."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.errors import UnsupportedError
from ..core.shared import expert_axes, site_tensors
from ..core.stacked import unfolded
from ..core.torch_internals import autocasts
from ..core.update_functions import Factors, FactorsFn

__all__ = ["exactly", "factors_at", "low_rank_update"]


def low_rank_update(adapter: Adapter, path: str, what: str) -> tuple[Tensor, Tensor, float]:
    """(A, B, s) of a site: the update is s B A.

    Args:
        adapter: one adapter.
        path: its site.
        what: the verb, for the message.

    Raises:
        UnsupportedError: the method's update isn't a product of two factors.
    """
    variant = adapter.layout.variant
    if variant.low_rank_factors is None:
        raise UnsupportedError(
            f"{what}: {variant.name}'s update isn't a product of two factors; apply them side by "
            f"side, ll.apply(model, (p1, p2), x)"
        )
    A, B, s = factors_at(variant.low_rank_factors, adapter, path)
    return (A, B, s) if isinstance(s, float) else (A, B * s, 1.0)


def factors_at(factors: FactorsFn[Any], adapter: Adapter, path: str) -> Factors:
    """What a method's `factors` give at a site: (A, B, s). Of stacked experts A and B have (E, ...)
    in front, and s is a number.
    """
    layout = adapter.layout
    p, site = unfolded(site_tensors(layout.shared, adapter._data, path), layout.sites[path])
    if not site.num_experts:
        return factors(layout.config, p, site)
    scales: list[float] = []

    def of_one(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        A, B, s = factors(layout.config, p, site)
        if isinstance(s, Tensor):
            return A, B * s
        scales.append(s)
        return A, B

    axes = expert_axes(p, layout.shared.get(path, ()))
    A, B = torch.func.vmap(of_one, in_dims=(axes,))(dict(p))
    return A, B, scales[0] if scales else 1.0


def exactly(adapters: Iterable[Adapter]) -> AbstractContextManager[object]:
    """A context without the caller's autocast, which would round products of adapters' tensors."""
    kinds = {t.device.type for adapter in adapters for p in adapter.values() for t in p.values()}
    stack = ExitStack()
    for kind in sorted(kinds):
        if autocasts(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
