"""LoRI's second training: of the entries of B that the first one moved furthest, from B = 0."""

from __future__ import annotations

from typing import Any

import torch

from ..core.adapter import Adapter, replace
from ..core.arguments import number
from ..core.errors import ConfigError, StructureError
from .alike import check_method

__all__ = ["masked_by"]


def masked_by(params: Adapter, fraction: float = 0.1) -> Adapter:
    """The adapter that trains the largest entries of a trained LoRI's B alone, from B = 0.

    A stays, so both adapters are in one subspace. Sites share the entries as their magnitudes say.
    Zhang et al. 2025, arXiv 2504.07448.

    Args:
        params: an adapter of ll.LoRIConfig, after its first training.
        fraction: what part of all B's entries is kept, in (0, 1].

    Raises:
        ConfigError: the fraction is out of range.
        StructureError: not a LoRI adapter, or a stack of them.
    """
    number(fraction, "masked_by: fraction")
    if not 0.0 < fraction <= 1.0:
        raise ConfigError(f"masked_by: fraction: expected a part in (0, 1], found {fraction}")
    _check(params)
    moved = {
        path: (held["lora_mask"] * held["lora_B"]).detach().abs() for path, held in params.items()
    }
    every = torch.cat([t.flatten().to("cpu", torch.float64) for t in moved.values()])
    chosen = torch.zeros_like(every)
    chosen[every.topk(max(1, int(fraction * every.numel()))).indices] = 1.0
    parts = iter(chosen.split([t.numel() for t in moved.values()]))
    data = {}
    for path, held in params.items():
        B = held["lora_B"]
        mask = next(parts).view(B.shape).to(held["lora_mask"])
        data[path] = {**held, "lora_B": torch.zeros_like(B), "lora_mask": mask}
    return replace(params, data)


def _check(params: Any) -> None:
    check_method(params, "lori", "ll.LoRIConfig", "masked_by")
    for path, held in params.items():
        if held["lora_B"].shape != params.layout.specs[path]["lora_B"].shape:
            raise StructureError(
                f"masked_by: {path!r} lora_B: expected {params.layout.specs[path]['lora_B'].shape},"
                f" found {tuple(held['lora_B'].shape)}; take a stack's members (ll.unstack) one by "
                f"one"
            )
