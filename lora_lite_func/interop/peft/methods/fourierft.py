"""PEFT's FourierFT: coefficients at frequencies drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import UnsupportedError
from ....variants import (
    FourierFTConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import patterned, ranks
from .seeded_entries import entries_of, seed_of

__all__ = ["FOURIERFT"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read fourierft_spectrum (n,), the coefficients at frequencies drawn from random_loc_seed.

    Raises:
        CheckpointError: the weight is too large for a permutation of its entries.
        ModelNeededError: no model was given.
    """
    site, c = entry.known("FourierFT has coefficients alone"), held["fourierft_spectrum"]
    seed = reader.whole("random_loc_seed", 777, 0)
    entries = entries_of(site, seed, c.shape[0], "FourierFT").to(torch.float64)
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
    counts = {path: a.config.n_frequency for a in adapters for path in a}  # type: ignore[attr-defined]
    seed = seed_of(adapters, "FourierFT", partial(entries_of, method="FourierFT"))
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


FOURIERFT = Codec(
    peft_type="FOURIERFT",
    configs=(FourierFTConfig,),
    suffixes=("fourierft_spectrum",),
    understood="n_frequency n_frequency_pattern scaling random_loc_seed",
    read=read,
    write=write,
    biased="fourier_only",
    transposed=True,
)
