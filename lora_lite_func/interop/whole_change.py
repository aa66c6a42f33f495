"""The part of an adapter that changes a weight as a whole, for updates that no method's factors
hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import CheckpointError, short_repr
from ..variants import LoKrConfig
from ..variants.lokr import split
from .assembly import ModuleEntry, Part

__all__ = ["whole_change"]


def whole_change(change: Tensor, entry: ModuleEntry) -> Part:
    """Return the part of a change of the weight itself (d_out, d_in), as 1 (x) the change.

    Raises:
        CheckpointError: the change is of another size.
    """
    site = entry.known("a change of the weight has its size")
    if change.shape != (site.d_out, site.d_in):
        raise CheckpointError(
            f"{short_repr(entry.path)}: expected a change of shape ({site.d_out}, {site.d_in}), "
            f"found {tuple(change.shape)}"
        )
    leaves = {"lora_w1": torch.ones(1, 1, dtype=change.dtype), "lora_w2": change.contiguous()}
    r = max(change.shape)
    usual = all(split(n, -1)[0] == 1 for n in change.shape)
    sited = {} if usual else {"w1_shapes": (1, 1)}
    return Part(LoKrConfig, leaves, {"decompose_both": False, "factor": -1}, r, r, sited=sited)
