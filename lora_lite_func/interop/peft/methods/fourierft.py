"""PEFT's FourierFT: coefficients at frequencies drawn from a seed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError, short_repr
from ....variants import (
    FourierFTConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import patterned, ranks

__all__ = ["FOURIERFT"]


_LARGEST = 2**31  # the most entries of a weight that a permutation is drawn for


@functools.lru_cache(maxsize=4)
def _frequencies(seed: int, n: int, d_out: int, d_in: int) -> Tensor:
    """Return PEFT's frequencies as (2, n) rows and columns: the first n entries of a seeded
    permutation of all entries.
    """
    flat = torch.randperm(
        d_out * d_in, generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    )[:n]
    return torch.stack([flat // d_in, flat % d_in]).to(torch.float64)


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read fourierft_spectrum (n,), the coefficients at frequencies drawn from random_loc_seed.

    Raises:
        CheckpointError: the weight is too large for a permutation of its entries.
        ModelNeededError: no model was given.
    """
    site, c = entry.known("FourierFT has coefficients alone"), held["fourierft_spectrum"]
    if site.d_out * site.d_in > _LARGEST:
        raise CheckpointError(
            f"{short_repr(entry.path)}: FourierFT permutes all entries of a weight, {site.d_out} "
            f"x {site.d_in} are too many"
        )
    seed = reader.whole("random_loc_seed", 777, 0)
    entries = _frequencies(seed, c.shape[0], site.d_out, site.d_in)
    fields = {"n_frequency": c.shape[0], "projection_seed": seed}
    return [
        Part(
            FourierFTConfig,
            {"lora_c": c, "lora_idx": entries},
            fields,
            alpha=reader.number("scaling", 150.0),
        )
    ]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write fourierft_spectrum (n,), with the seed that PEFT draws the same frequencies from. The
    file has one scale, so the coefficients of sites with another alpha are scaled.

    Raises:
        UnsupportedError: alpha is 0, PEFT draws other frequencies, or its patterns can't tell the
            sites apart.
    """
    alpha = next(iter(ranks(adapters)[1].values()))
    if not alpha:
        raise UnsupportedError(
            "to_peft: a FourierFT of alpha=0 has no coefficients in PEFT; give it another alpha"
        )
    seeds = [777, *dict.fromkeys(a.config.projection_seed for a in adapters)]  # type: ignore[attr-defined]
    counts = {path: a.config.n_frequency for a in adapters for path in a}  # type: ignore[attr-defined]
    seed = next((s for s in seeds if all(_drawn_from(s, a) for a in adapters)), None)
    if seed is None:
        raise UnsupportedError(
            "to_peft: PEFT draws FourierFT's frequencies from its own seed, and these were drawn "
            "otherwise; only adapters that came from "
            "PEFT go back; merge this one (ll.merge) instead"
        )
    tensors = {
        p: {"fourierft_spectrum": h["lora_c"] * (a.sites[p].alpha / alpha)}
        for a in adapters
        for p, h in a.items()
    }
    common, rest = patterned(counts, "FourierFT's n_frequency_pattern")
    return Written(
        {
            "n_frequency": common,
            "n_frequency_pattern": rest,
            "scaling": alpha,
            "random_loc_seed": seed,
        },
        tensors,
    )


def _drawn_from(seed: int, adapter: Adapter) -> bool:
    """Tell whether PEFT would draw all the adapter's frequencies from this seed."""
    sites = adapter.sites
    return all(
        torch.equal(
            h["lora_idx"].double().cpu(),
            _frequencies(seed, h["lora_idx"].shape[1], sites[p].d_out, sites[p].d_in),
        )
        for p, h in adapter.items()
    )


FOURIERFT = Codec(
    peft_type="FOURIERFT",
    configs=(FourierFTConfig,),
    suffixes=("fourierft_spectrum",),
    understood="n_frequency n_frequency_pattern scaling random_loc_seed",
    read=read,
    write=write,
    biased="fourier_only",
)
