"""PEFT's Poly: skills that tasks share, and each task's logits for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError, short_repr
from ....variants import PolyConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config

__all__ = ["POLY"]

_A, _B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read poly_lora_A (P, Q, d_in / P, r), poly_lora_B (P, Q, r, d_out / P) and
    poly_router.module_logits (tasks, P Q); the scale is 1 / r.

    Raises:
        CheckpointError: shapes that aren't those, or that the config denies.
    """
    A, B, logits = held[_A], held[_B], held[_LOGITS]
    said = (reader.whole("n_splits", 1), reader.whole("n_skills", 4), reader.whole("r", 8))
    tasks = reader.whole("n_tasks", 1)
    found = (*A.shape[:2], A.shape[-1])
    if A.ndim != 4 or B.ndim != 4 or found != said or logits.shape[:1] != (tasks,):
        raise CheckpointError(
            f"{reader.where}: {short_repr(entry.path)}: expected factors of n_splits, n_skills, r "
            f"= {said} and logits of {tasks} tasks, found {tuple(A.shape)}, {tuple(B.shape)} and "
            f"{tuple(logits.shape)}"
        )
    fields = {"tasks": tasks, "skills": said[1], "splits": said[0]}
    leaves = {"lora_A": A.mT, "lora_B": B.mT, "lora_logits": logits}
    return [Part(PolyConfig, leaves, fields, said[2], 1.0)]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write each site's skills and logits; alpha goes into the second factors.

    Raises:
        UnsupportedError: the adapters differ in tasks, skills or splits, or the sites in rank.
    """
    said = of_config(adapters, "tasks", "skills", "splits", method="Poly")
    sites = {path: site for a in adapters for path, site in a.sites.items()}
    odd = next((s for s in sites.values() if s.r != next(iter(sites.values())).r), None)
    if odd is not None:
        raise UnsupportedError(
            f"to_peft: {odd.path!r}: one Poly file has one r, found {odd.r} beside another; write "
            f"a folder for each"
        )
    tensors = {
        path: {
            _A: held["lora_A"].mT,
            _B: held["lora_B"].mT * (sites[path].scaling * sites[path].r),
            _LOGITS: held["lora_logits"],
        }
        for a in adapters
        for path, held in a.items()
    }
    fields = {f"n_{name}": value for name, value in said.items()}
    r = next(iter(sites.values())).r
    return Written(fields | {"poly_type": "poly", "r": r}, tensors)


def sizes(path: str, held: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return (d_in, d_out), as the factors tell them."""
    A, B = held[_A], held[_B]
    return A.shape[0] * A.shape[2], B.shape[0] * B.shape[3]


POLY = Codec(
    peft_type="POLY",
    configs=(PolyConfig,),
    suffixes=(_A, _B, _LOGITS),
    understood="r n_tasks n_skills n_splits poly_type",
    read=read,
    write=write,
    sizes=sizes,
)
