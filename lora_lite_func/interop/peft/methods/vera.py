"""PEFT's VeRA: two trained vectors a module around one pair of random projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.adapter import Adapter
from ....variants import (
    VeRAConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config
from .shared_projections import corner, joined, shared_tensor

__all__ = ["VERA"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read vera_lambda_b (d_out,) and vera_lambda_d (r,), with corners of the shared vera_A (r,
    most) and vera_B (most, r).

    Raises:
        CheckpointError: the shared tensors are missing or too small.
        ModelNeededError: no model was given.
    """
    site, b, d = (
        entry.known("VeRA has a vector per output alone"),
        held["vera_lambda_b"],
        held["vera_lambda_d"],
    )
    r = d.shape[0]
    leaves = {
        "lora_vera_b": b,
        "lora_vera_d": d,
        "lora_vera_A": corner(shared_tensor(reader, entry, "vera_A"), "vera_A", r, site.d_in),
        "lora_vera_B": corner(shared_tensor(reader, entry, "vera_B"), "vera_B", site.d_out, r),
    }
    return [Part(VeRAConfig, leaves, {"dropout": reader.number("vera_dropout", 0.0)}, r)]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write vera_lambda_b (d_out,) and vera_lambda_d (r,) of each site, and the shared projections
    vera_A and vera_B.

    PEFT has one pair of projections for all modules. Unlike pairs lie side by side in it as further
    directions, and a module's vera_lambda_d is zero in those that aren't its own.

    Raises:
        UnsupportedError: the adapters differ in dropout, or projections disagree where they
            overlap.
    """
    said = of_config(adapters, "dropout", method="VeRA")
    held = {path: h for a in adapters for path, h in a.items()}
    groups: list[list[str]] = []
    for path, h in held.items():
        alike = next((g for g in groups if all(_overlap(h, held[p]) for p in g)), None)
        groups.append([path]) if alike is None else alike.append(path)
    pairs = [
        [
            joined([held[p][f"lora_vera_{n}"] for p in g], f"vera_{n}", "write two folders")
            for n in "AB"
        ]
        for g in groups
    ]
    ranks_ = [A.shape[0] for A, _ in pairs]
    d_in, d_out = max(A.shape[1] for A, _ in pairs), max(B.shape[0] for _, B in pairs)
    shared = {
        "vera_A": torch.cat([F.pad(A, (0, d_in - A.shape[1])) for A, _ in pairs]),
        "vera_B": torch.cat([F.pad(B, (0, 0, 0, d_out - B.shape[0])) for _, B in pairs], dim=1),
    }
    tensors, r = {}, sum(ranks_)
    for i, group in enumerate(groups):
        before = sum(ranks_[:i])
        for path in group:
            d = F.pad(held[path]["lora_vera_d"], (before, r - before - ranks_[i]))
            tensors[path] = {"vera_lambda_b": held[path]["lora_vera_b"], "vera_lambda_d": d}
    return Written(
        {"r": r, "vera_dropout": said["dropout"], "save_projection": True}, tensors, shared
    )


def _overlap(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Tell whether two modules' projections can be corners of one pair."""
    for name in ("lora_vera_A", "lora_vera_B"):
        t, u = one[name], two[name]
        corner = tuple(slice(min(sizes)) for sizes in zip(t.shape, u.shape, strict=True))
        if not torch.equal(t[corner], u[corner].to(t)):
            return False
    return one["lora_vera_d"].shape == two["lora_vera_d"].shape


VERA = Codec(
    peft_type="VERA",
    configs=(VeRAConfig,),
    suffixes=("vera_lambda_b", "vera_lambda_d"),
    understood="r vera_dropout save_projection projection_prng_key",
    read=read,
    write=write,
    shared=("vera_A", "vera_B"),
    ignored="d_initial",
    biased="vera_only",
    transposed=True,
)
