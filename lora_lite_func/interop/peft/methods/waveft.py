"""PEFT's WaveFT: wavelet coefficients at places drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import UnsupportedError
from ....core.site import Site
from ....variants import WaveFTConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import patterned, ranks, refuse_dropout
from .seeded_entries import entries_of, seed_of

__all__ = ["WAVEFT"]


def _places(site: Site, seed: int, n: int) -> Tensor:
    """Return the places of PEFT's coefficients in our matrix, (2, n). PEFT calls the quarter beside
    the sums by what is high in it along rows, so two quarters change places.
    """
    rows, columns = entries_of(site, seed, n, "WaveFT")
    half_o, half_i = (site.d_out + 1) // 2, (site.d_in + 1) // 2
    low_o, low_i = rows < half_o, columns < half_i
    right, below = low_o & ~low_i, ~low_o & low_i
    turned_rows = rows + half_o * right.long() - half_o * below.long()
    turned_columns = columns - half_i * right.long() + half_i * below.long()
    return torch.stack([turned_rows, turned_columns])


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read waveft_spectrum (n,), the coefficients at places drawn from random_loc_seed.

    Raises:
        CheckpointError: another wavelet than Haar's, none, or too large a weight.
        ModelNeededError: no model was given.
    """
    site, c = entry.known("WaveFT has coefficients alone"), held["waveft_spectrum"]
    if reader.get("wavelet_family", "db1") != "db1":
        raise reader.refuse("wavelet_family", "'db1', Haar's")
    if not reader.flag("use_idwt", True):
        raise reader.refuse("use_idwt", "true")
    seed = reader.whole("random_loc_seed", 777, 0)
    places = _places(site, seed, c.shape[0]).to(torch.float64)
    fields = {"n_frequency": c.shape[0], "projection_seed": seed}
    alpha = reader.number("scaling", 25.0)
    return [Part(WaveFTConfig, {"lora_c": c, "lora_idx": places}, fields, alpha=alpha)]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write waveft_spectrum (n,), with the seed that PEFT draws the same places from. The file has
    one scale, so the coefficients of sites with another alpha are scaled.

    Raises:
        UnsupportedError: alpha is 0, PEFT draws other places, its patterns can't tell the sites
            apart, or inputs are dropped.
    """
    refuse_dropout(adapters, "WaveFT")
    alpha = next(iter(ranks(adapters)[1].values()))
    if not alpha:
        raise UnsupportedError(
            "to_peft: a WaveFT of alpha=0 has no coefficients in PEFT; give it another alpha"
        )
    counts = {path: a.config.n_frequency for a in adapters for path in a}  # type: ignore[attr-defined]
    common, rest = patterned(counts, "WaveFT's n_frequency_pattern")
    tensors = {
        p: {"waveft_spectrum": h["lora_c"] * (a.sites[p].alpha / alpha)}
        for a in adapters
        for p, h in a.items()
    }
    fields: dict[str, Any] = {
        "scaling": alpha,
        "random_loc_seed": seed_of(adapters, "WaveFT", _places),
    }
    fields |= {"n_frequency": common, "n_frequency_pattern": rest}
    return Written(fields | {"wavelet_family": "db1", "use_idwt": True}, tensors)


WAVEFT = Codec(
    peft_type="WAVEFT",
    configs=(WaveFTConfig,),
    suffixes=("waveft_spectrum",),
    understood="n_frequency n_frequency_pattern scaling random_loc_seed wavelet_family use_idwt",
    ignored="proportional_parameters",
    read=read,
    write=write,
    biased="waveft_only",
    transposed=True,
)
