"""PEFT's TinyLoRA: vectors that mix fixed matrices between singular directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError, short_repr
from ....variants import TinyLoRAConfig
from ....variants.lora_xs import tied_groups
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import clamped_rank, of_config
from .shared_projections import shared_tensor

__all__ = ["TINYLORA"]

_V = "tinylora_v."


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read tinylora_A (r, d_in), tinylora_B (d_out, r), tinylora_P (u, r, r), with the shared
    tinylora_v.<group> (u,). An embedding's are those of its table as it is stored. Where P wasn't
    saved it is drawn from PEFT's seed.

    Raises:
        CheckpointError: the vector of this module is missing, or a P that was saved.
        ModelNeededError: no model was given.
    """
    entry.known("TinyLoRA counts the model's modules in their order")
    A, B = held["tinylora_A"], held["tinylora_B"]
    tying = reader.number("weight_tying", 0.0)
    number = tied_groups(entry.count, tying)[entry.index]
    v = shared_tensor(reader, entry, f"{_V}{number}")
    P = held.get("tinylora_P")
    if P is None:
        if reader.get("save_projection") is True:
            raise CheckpointError(
                f"{reader.where}: save_projection is true, but {short_repr(entry.path)} has no "
                f"tinylora_P"
            )
        P = _drawn(reader.whole("projection_seed", 42, 0) + entry.index, v.shape[0], A.shape[0])
    if entry.kind == "embedding":
        A, B, P = B.mT, A.mT, P.mT
    leaves = {"lora_v": v, "lora_P": P, "lora_A": A, "lora_B": B}
    fields = {
        "u": v.shape[0],
        "tying": tying,
        "dropout": reader.number("tinylora_dropout", 0.0),
    }
    sited = {"tied": number} if 0.0 < tying < 1.0 else {}
    return [Part(TinyLoRAConfig, leaves, fields, A.shape[0], sited=sited)]


def _drawn(seed: int, u: int, r: int) -> Tensor:
    """Return PEFT's matrices (u, r, r)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    std = 1.0 / math.sqrt(r)
    return torch.normal(0.0, std, (u, r, r), generator=generator, device="cpu")


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write each site's tensors, and its vector under the number of its group in the order of the
    model.

    Raises:
        CheckpointError: no model was given.
        UnsupportedError: the adapters differ in u, tying or dropout, a rank isn't the common one,
            or PEFT would tie other layers.
    """
    said = of_config(adapters, "u", "tying", "dropout", method="TinyLoRA")
    r = clamped_rank(adapters, "TinyLoRA", lambda site: min(site.d_in, site.d_out))
    if not modules:
        raise CheckpointError(
            "to_peft: PEFT's TinyLoRA numbers its vectors in the order of the model's modules; "
            "give the base model"
        )
    held = {path: h for a in adapters for path, h in a.items()}
    tables = {p for a in adapters for p, site in a.sites.items() if site.kind == "embedding"}
    shared: dict[str, Tensor] = {}
    tensors = {}
    order = [path for path in modules if path in held]
    for path, number in zip(order, tied_groups(len(order), said["tying"]), strict=True):
        h = held[path]
        A, B, P = h["lora_A"], h["lora_B"], h["lora_P"]
        if path in tables:
            A, B, P = B.mT, A.mT, P.mT
        if not torch.equal(shared.setdefault(f"{_V}{number}", h["lora_v"]), h["lora_v"]):
            raise UnsupportedError(
                f"to_peft: {path!r}: with weight_tying={said['tying']} PEFT's TinyLoRA has one "
                f"vector for this layer and one before it, and these differ; write it with "
                f"as_lora=True"
            )
        tensors[path] = {"tinylora_A": A, "tinylora_B": B, "tinylora_P": P}
    fields = {"r": r, "u": said["u"], "tinylora_dropout": said["dropout"]}
    more = {"weight_tying": said["tying"], "save_projection": True}
    return Written(fields | more, tensors, shared)


TINYLORA = Codec(
    peft_type="TINYLORA",
    configs=(TinyLoRAConfig,),
    suffixes=("tinylora_A", "tinylora_B", "tinylora_P"),
    understood="r u weight_tying tinylora_dropout projection_seed save_projection",
    ignored="init_v_bound",
    read=read,
    write=write,
    shared=(_V,),
    kinds="linear embedding",
    biased="tinylora_only",
    transposed=True,
)
