"""What allocations by importance share: AdaLoRA's of triplets, AdaMSS's of subspaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["best_of_all", "zeros_like"]


def zeros_like(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Running means at their start: zeros in float32, {path: {name: zeros}}."""
    return {
        path: {name: torch.zeros_like(t, dtype=torch.float32) for name, t in ts.items()}
        for path, ts in tensors.items()
    }


def best_of_all(scores: Mapping[str, Tensor], count: Callable[[int], int]) -> dict[str, Any]:
    """A mask for each site of those with the highest scores, chosen from all sites together.

    Args:
        scores: {path: (n,)}.
        count: how many are chosen of so many.
    """
    flat = torch.cat(list(scores.values()))
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(count(flat.numel())).indices] = True
    return dict(zip(scores, mask.split([len(s) for s in scores.values()]), strict=True))
