"""Entries of a weight that PEFT draws from a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError, short_repr
from ....core.random import kept
from ....core.site import Site

__all__ = ["entries_of", "seed_of"]

_LARGEST = 2**31  # the most entries of a weight that a permutation is drawn for


@kept
def _drawn(seed: int, n: int, d_out: int, d_in: int) -> Tensor:
    """Return (2, n) rows and columns: the first n entries of a seeded permutation of all."""
    flat = torch.randperm(
        d_out * d_in, generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    )[:n]
    return torch.stack([flat // d_in, flat % d_in])


def entries_of(site: Site, seed: int, n: int, method: str) -> Tensor:
    """Return PEFT's n entries of a weight, rows and columns (2, n).

    Raises:
        CheckpointError: the weight is too large for a permutation of its entries.
    """
    if site.d_out * site.d_in > _LARGEST:
        raise CheckpointError(
            f"{short_repr(site.path)}: {method} permutes all entries of a weight, {site.d_out} "
            f"x {site.d_in} are too many"
        )
    return _drawn(seed, n, site.d_out, site.d_in)


def seed_of(
    adapters: Sequence[Adapter], method: str, entries: Callable[[Site, int, int], Tensor]
) -> int:
    """Return the seed that PEFT draws all the adapters' entries from.

    Args:
        adapters: with leaves lora_idx.
        method: PEFT's name, for messages.
        entries: (site, seed, n) -> the leaf that PEFT's draw makes.

    Raises:
        UnsupportedError: there is none.
    """
    seeds = [777, *dict.fromkeys(a.config.projection_seed for a in adapters)]  # type: ignore[attr-defined]
    for seed in seeds:
        if all(
            torch.equal(
                h["lora_idx"].double().cpu(),
                entries(a.sites[path], seed, h["lora_idx"].shape[1]).double(),
            )
            for a in adapters
            for path, h in a.items()
        ):
            return seed
    raise UnsupportedError(
        f"to_peft: PEFT draws {method}'s places from its own seed, and these were drawn "
        f"otherwise; only adapters that came from PEFT go back; merge this one (ll.merge) instead"
    )
