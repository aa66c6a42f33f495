"""PEFT's PSOFT: a rotation in the principal subspace of the weight, which the file doesn't hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError, short_repr
from ....variants import PSOFTConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, one_of, ranks

__all__ = ["PSOFT"]

_R, _A, _B = "psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"
_APART = 1e-5  # singular values nearer than this part of the largest share their directions


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read psoft_R.weight (r (r - 1) / 2,), and vector_a, vector_b (r,) where PEFT trained them.
    The subspace is decomposed anew, as PEFT does, whose signs are those of this decomposition.

    Raises:
        CheckpointError: a form of the rotation or of the decomposition that isn't read, or
            directions that the weight doesn't tell apart.
        ModelNeededError: no model was given.
    """
    r = reader.whole("r", 32)
    for field, expected, default in (("psoft_orth", True, True), ("psoft_svd", "full", "full")):
        if reader.get(field, default) != expected:
            raise reader.refuse(field, repr(expected).lower())
    start = reader.get("ab_svd_init", "psoft_init")
    if start not in ("psoft_init", "pissa_init"):
        raise reader.refuse("ab_svd_init", "'psoft_init' or 'pissa_init'")
    U, S, Vh = _subspace(entry, r)
    zeros = torch.zeros(r, dtype=held[_R].dtype)
    leaves = {"lora_q": held[_R], "lora_U": U, "lora_S": S, "lora_Vh": Vh}
    leaves["lora_gain_a"] = held[_A] - 1.0 if _A in held else zeros
    leaves["lora_gain_b"] = held[_B] - 1.0 if _B in held else zeros
    fields = {"both_sides": start == "pissa_init", "dropout": reader.number("psoft_dropout", 0.0)}
    return [Part(PSOFTConfig, leaves, fields, r)]


def _subspace(entry: ModuleEntry, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the r top singular triplets as PEFT decomposes the weight, in float32.

    Raises:
        CheckpointError: some values are so near that their directions could be any mixture.
        ModelNeededError: no model was given.
    """
    W = entry.weight("PSOFT's subspace").to(torch.float32)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    gaps = (S[:r] - torch.cat([S, S.new_zeros(1)])[1 : r + 1]) / S[0].clamp_min(1e-30)
    if bool((gaps < _APART).any()):
        raise CheckpointError(
            f"{short_repr(entry.path)}: singular values of its weight are equal but for rounding, "
            f"so a PSOFT file doesn't tell which directions it rotates; merge it in PEFT where it "
            f"was trained"
        )
    return U[:, :r], S[:r], Vh[:r]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write psoft_R.weight (r (r - 1) / 2,), and psoft_R.vector_a and vector_b (r,). Entries
    between directions of which one has the other sign in PEFT's decomposition change theirs.

    Raises:
        ModelNeededError: no model was given.
        UnsupportedError: the sites differ in a setting, or the directions aren't the weight's.
    """
    said = of_config(adapters, "both_sides", "dropout", method="PSOFT")
    r = one_of(ranks(adapters)[0], "PSOFT", "r")
    rows, columns = torch.triu_indices(r, r, 1)
    tensors = {}
    for a in adapters:
        for path, held in a.items():
            entry = ModuleEntry(path, {}, a.sites[path], modules.get(path))
            cosine = (_subspace(entry, r)[0] * held["lora_U"].to(torch.float32).cpu()).sum(0)
            if bool((cosine.abs() < 0.999).any()):
                raise UnsupportedError(
                    f"to_peft: {path!r}: PEFT decomposes the weight anew, and this adapter's "
                    f"directions aren't those of this one's; merge it (ll.merge) instead"
                )
            sign = cosine.sign().to(held["lora_q"])
            tensors[path] = {
                _R: held["lora_q"] * sign[rows] * sign[columns],
                _A: held["lora_gain_a"] + 1.0,
                _B: held["lora_gain_b"] + 1.0,
            }
    start = "pissa_init" if said["both_sides"] else "psoft_init"
    fields = {"r": r, "psoft_alpha": r, "ab_svd_init": start, "psoft_dropout": said["dropout"]}
    return Written(fields | {"psoft_orth": True, "psoft_svd": "full"}, tensors)


PSOFT = Codec(
    peft_type="PSOFT",
    configs=(PSOFTConfig,),
    suffixes=(_R, _A, _B),
    understood="r ab_svd_init psoft_dropout psoft_orth psoft_mag_a psoft_mag_b psoft_svd",
    ignored="psoft_alpha psoft_svd_lowrank_niter random_seed num_cayley_neumann_terms "
    "cayley_neumann_eps",
    read=read,
    write=write,
)
