"""PEFT's RandLoRA: trained scales of random bases that all modules share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import UnsupportedError
from ....variants import (
    RandLoRAConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, ranks
from .shared_projections import corner, joined, shared_tensor
from .tensor_names import same

__all__ = ["RANDLORA"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read randlora_lambda (r, N) and randlora_gamma (N, small), with corners of the shared
    randlora_A (r, 1, small) and randlora_B (large, N, r).

    PEFT pairs the columns of B, flattened map by map, with the rows of A, flattened direction by
    direction. Ours are paired as the paper has them, so the columns move.

    Raises:
        CheckpointError: the shared tensors are missing or too small.
        ModelNeededError: no model was given.
    """
    site, scales = entry.known("RandLoRA's sides depend on both sizes"), held["randlora_gamma"]
    small, large = sorted((site.d_in, site.d_out))
    n, r = scales.shape[0], held["randlora_lambda"].shape[0]
    shared = {
        **entry.shared,
        **{k: t for k, t in held.items() if k in ("randlora_A", "randlora_B")},
    }
    entry = ModuleEntry(entry.path, shared, entry.site, entry.module)
    A = corner(shared_tensor(reader, entry, "randlora_A"), "randlora_A", r, 1, small)[:, 0]
    B = corner(shared_tensor(reader, entry, "randlora_B"), "randlora_B", large, n, r)
    paired = B.flatten(1).unflatten(1, (r, n)).transpose(1, 2)
    leaves = {
        "lora_lambda": held["randlora_lambda"],
        "lora_gamma": scales,
        "lora_rand_A": A,
        "lora_rand_B": paired,
    }
    fields = {"dropout": reader.number("randlora_dropout", 0.0)}
    return [Part(RandLoRAConfig, leaves, fields, r, reader.number("randlora_alpha", 640))]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write randlora_lambda (r, N) and randlora_gamma (N, small) of each site, and the shared
    randlora_A (r, 1, small) and randlora_B (large, N, r), which PEFT expects under every module
    again.

    Raises:
        UnsupportedError: the sites differ in r, alpha or the shared bases, or the adapters in
            dropout.
    """
    said, (r, alpha) = of_config(adapters, "dropout", method="RandLoRA"), ranks(adapters)
    if len(set(r.values())) != 1 or len(set(alpha.values())) != 1:
        raise UnsupportedError(
            "to_peft: one RandLoRA file has one r and one alpha; write a folder for each"
        )
    held = [h for a in adapters for h in a.values()]
    maps = [
        h["lora_rand_B"].transpose(1, 2).flatten(1).unflatten(1, h["lora_rand_B"].shape[1:])
        for h in held
    ]
    way_out, rank = "write a folder for each shape, or merge", next(iter(r.values()))
    most = [
        max(sizes)
        for sizes in zip(
            *((s.d_in, s.d_out) for a in adapters for s in a.sites.values()), strict=True
        )
    ]
    # PEFT sizes the shared tensors by the largest of each side.
    least_A, least_B = (
        (rank, 1, min(most)),
        (max(most), -(-min(most) // rank), rank),
    )
    shared = {
        "randlora_A": joined(
            [h["lora_rand_A"][:, None] for h in held], "randlora_A", way_out, least_A
        ),
        "randlora_B": joined(maps, "randlora_B", way_out, least_B),
    }
    tensors = same(adapters, lora_lambda="randlora_lambda", lora_gamma="randlora_gamma")
    for each in tensors.values():
        each |= shared  # PEFT expects the shared tensors under every module again
    fields = {
        "r": rank,
        "randlora_alpha": next(iter(alpha.values())),
        "randlora_dropout": said["dropout"],
    }
    return Written(fields | {"save_projection": True}, tensors, shared)


RANDLORA = Codec(
    peft_type="RANDLORA",
    configs=(RandLoRAConfig,),
    suffixes=("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
    understood="r randlora_alpha randlora_dropout save_projection projection_prng_key",
    read=read,
    write=write,
    shared=("randlora_A", "randlora_B"),
    ignored="sparse very_sparse",
    biased="randlora_only",
    transposed=True,
)
