"""Embeddings as sites: ids come in where features would.

A padding row stays what it is, and a bound on norms holds for adapted rows too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["bounded", "defers", "keeping_padding", "padded", "rows"]


def defers(cls: type) -> bool:
    """Whether a class's forward calls nn.Embedding's for the look-up, whatever it does to the ids
    before and to the rows after.
    """
    for base in cls.__mro__:
        if base is nn.Embedding:
            return True
        forward = base.__dict__.get("forward")
        if forward is not None:
            code = getattr(forward, "__code__", None)
            if (
                code is None
                or "__class__" not in code.co_freevars
                or "forward" not in code.co_names
                or "weight" in code.co_names
            ):
                return False
    return False


def rows(module: Any, ids: Tensor) -> Tensor:
    """The table's rows as they are stored, (..., d_out): torch would bound them in place."""
    return F.embedding(
        ids, module.weight, module.padding_idx, None, 2.0, module.scale_grad_by_freq, module.sparse
    )


def bounded(y: Tensor, module: Any) -> Tensor:
    """Rows (..., d_out) with norms of at most the layer's max_norm, as torch.embedding_renorm_ has
    them; gradients go through the bound.
    """
    norm = torch.linalg.vector_norm(y, module.norm_type, dim=-1, keepdim=True)
    return torch.where(norm > module.max_norm, y * (module.max_norm / (norm + 1e-7)), y)


def padded(module: Any, ids: Tensor, y: Tensor, frozen: Tensor) -> Tensor:
    """Adapted rows; that of the padding stays as it was, since it isn't trained."""
    if module.padding_idx is None:
        return y
    return torch.where((ids == module.padding_idx)[..., None], frozen, y)


def keeping_padding(module: Any, stored: Tensor, new: Tensor) -> Tensor:
    """An adapted table (ids, d_out) with its padding row as it is stored."""
    padding = getattr(module, "padding_idx", None)  # a table that is read from a file has no module
    if padding is None:
        return new
    here = torch.arange(len(stored), device=stored.device)[:, None] == padding
    return torch.where(here, stored.to(new.dtype), new)
