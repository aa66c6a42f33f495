"""PEFT's PVeRA: two trained vectors a module around one pair of random projections, of which the
first makes a mean and a logarithm of a variance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....variants import PVeRAConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, one_of, ranks
from .shared_projections import corner, joined, shared_tensor

__all__ = ["PVERA"]

_APART = "write a folder for each shape, or the mean as a LoRA (as_lora=True)"


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read pvera_lambda_b (d_out,) and pvera_lambda_d (2r,), with corners of the shared pvera_A
    (2r, most) and pvera_B (most, r).

    Raises:
        CheckpointError: the shared tensors are missing or too small.
        ModelNeededError: no model was given.
    """
    site, d = entry.known("PVeRA has a vector per output alone"), held["pvera_lambda_d"]
    r = d.shape[0] // 2
    leaves = {
        "lora_b": held["pvera_lambda_b"],
        "lora_d": d,
        "lora_A": corner(shared_tensor(reader, entry, "pvera_A"), "pvera_A", 2 * r, site.d_in),
        "lora_B": corner(shared_tensor(reader, entry, "pvera_B"), "pvera_B", site.d_out, r),
    }
    fields = {"dropout": reader.number("pvera_dropout", 0.0), "sample": True}
    fields["sample_at_inference"] = bool(reader.get("sample_at_inference"))
    return [Part(PVeRAConfig, leaves, fields, r)]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write pvera_lambda_b (d_out,) and pvera_lambda_d (2r,) of each site, and the shared
    projections pvera_A and pvera_B. Unlike VeRA's, projections of unlike shapes can't lie side by
    side in one pair: directions that a module has no part in would be noise to it.

    Raises:
        UnsupportedError: the adapters differ in r, dropout or sampling, or their projections aren't
            corners of one pair.
    """
    said = of_config(adapters, "dropout", "sample_at_inference", method="PVeRA")
    r = one_of(ranks(adapters)[0], "PVeRA", "r")
    held = {path: h for a in adapters for path, h in a.items()}
    shared = {
        f"pvera_{name}": joined([h[f"lora_{name}"] for h in held.values()], f"pvera_{name}", _APART)
        for name in "AB"
    }
    tensors = {
        path: {"pvera_lambda_b": h["lora_b"], "pvera_lambda_d": h["lora_d"]}
        for path, h in held.items()
    }
    fields = {"r": r, "pvera_dropout": said["dropout"], "save_projection": True}
    fields["sample_at_inference"] = said["sample_at_inference"]
    return Written(fields, tensors, shared)


PVERA = Codec(
    peft_type="PVERA",
    configs=(PVeRAConfig,),
    suffixes=("pvera_lambda_b", "pvera_lambda_d"),
    understood="r pvera_dropout save_projection projection_prng_key sample_at_inference",
    read=read,
    write=write,
    shared=("pvera_A", "pvera_B"),
    ignored="d_initial generator_seed",
    biased="pvera_only",
    transposed=True,
)
