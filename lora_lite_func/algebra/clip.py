"""clip_grads: the gradients of each member shortened to a length."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..core.adapter import count_members
from ..core.errors import StructureError
from .alike import every_adapter
from .rates import along_members, check_fit, check_not_negative, is_stack

__all__ = ["clip_grads"]


def clip_grads(grads: Any, max_norm: float | Tensor) -> tuple[Any, Tensor]:
    """(gradients, norms): each member's shortened to a length of at most `max_norm` over all its
    leaves, on its own.

    Args:
        grads: gradients of one adapter, of a stack of K, or of a tuple, list or dict of such, whose
            length is that of all together; absent leaves stay absent.
        max_norm: the bound, or one per member (K,).

    Returns:
        The clipped gradients and the lengths before, () or (K,).

    Raises:
        ConfigError: a bound that is negative, or isn't a number.
        StructureError: not an Adapter, a vector that isn't one per member of a stack, or stacks
            beside single adapters.
    """
    adapters = every_adapter(grads, "clip_grads")
    check_not_negative(max_norm, "clip_grads: max_norm")
    check_fit(max_norm, grads, "clip_grads: max_norm")
    counts = {count_members(a, "clip_grads") if is_stack(a) else None for a in adapters}
    if len(counts) > 1:
        raise StructureError(
            "clip_grads: expected single adapters, or stacks of one size, found both or several"
        )
    start = 0 if counts == {None} else 1
    present = pytree.tree_leaves(grads)
    if not present:
        return grads, torch.zeros(())
    norms = torch.stack(
        [
            torch.linalg.vector_norm(t.flatten(start), dim=-1)
            for t in (t if t.ndim > start else t[..., None] for t in present)
        ]
    )
    norm = torch.linalg.vector_norm(norms, dim=0)  # () or (K,)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return pytree.tree_map(lambda t: t * along_members(factor, t).to(t.dtype), grads), norm
