"""An adapter's update at a site as a pair of factors, whatever the method."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.errors import UnsupportedError
from ..core.shared import site_tensors
from ..core.stacked import unfolded
from ..core.torch_internals import autocasts

__all__ = ["exactly", "low_rank_update"]


def low_rank_update(adapter: Adapter, path: str, what: str) -> tuple[Tensor, Tensor, float]:
    """(A, B, s) of a site: the update is s B A.

    Args:
        adapter: one adapter.
        path: its site.
        what: the verb, for the message.

    Raises:
        UnsupportedError: the method's update isn't a product of two factors.
    """
    layout = adapter.layout
    p, site = unfolded(site_tensors(layout.shared, adapter._data, path), layout.sites[path])
    variant = layout.variant
    if variant.low_rank_factors is None:
        raise UnsupportedError(
            f"{what}: {variant.name}'s update isn't a product of two factors; apply them side by "
            f"side, ll.apply(model, (p1, p2), x)"
        )
    A, B, s = variant.low_rank_factors(layout.config, p, site)
    return (A, B, s) if isinstance(s, float) else (A, B * s, 1.0)


def exactly(adapters: Iterable[Adapter]) -> AbstractContextManager[object]:
    """A context without the caller's autocast, which would round products of adapters' tensors."""
    kinds = {t.device.type for adapter in adapters for p in adapter.values() for t in p.values()}
    stack = ExitStack()
    for kind in sorted(kinds):
        if autocasts(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
