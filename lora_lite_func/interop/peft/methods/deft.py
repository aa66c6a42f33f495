"""PEFT's DEFT and PaRa: directions that leave a layer's output, and a map that fills them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import UnsupportedError
from ....variants import DEFTConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import clamped_rank, of_config

__all__ = ["DEFT"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read deft_P (d_out, r) and, unless it is PaRa, deft_R (r, d_in), which PEFT scales by alpha /
    r where there is an alpha. Nothing is kept of the start, so right0 is zero.

    Raises:
        CheckpointError: the decomposition isn't one that PEFT has.
        ModelNeededError: no model was given and the file is PaRa's, which has one side alone.
    """
    P, para = held["deft_P"], reader.flag("para")
    r, method = P.shape[1], reader.get("decomposition_method", "relu")
    if method not in ("relu", "qr"):
        raise reader.refuse("decomposition_method", "'relu' or 'qr'")
    leaves = {"lora_P": P, "lora_gain": torch.ones(())}
    if para:
        entry.known("PaRa has directions of the output alone")
    else:
        s = reader.number("alpha", 0.0) / r if reader.get("alpha") else 1.0
        turned = _turned(P, method).to(held["deft_R"].dtype)
        leaves["lora_R"] = held["deft_R"] * (s * turned)[:, None]
        leaves["lora_right0"] = torch.zeros_like(P)
    return [Part(DEFTConfig, leaves, {"decomposition": method, "para": para}, r)]


def _turned(P: Tensor, method: str) -> Tensor:
    """Return the signs (r,) by which columns of PEFT's orthonormal factor differ from ours, which
    point as those of P do.
    """
    if method == "relu":
        return torch.ones(P.shape[1], dtype=P.dtype)
    sign = torch.linalg.qr(P.to(torch.float32))[1].diagonal().sign()
    return torch.where(sign == 0, 1.0, sign).to(P.dtype)


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write deft_P (d_out, r), and deft_R (r, d_in) with what our form keeps of the start.

    Raises:
        ModelNeededError: no model was given, and the start is a part of R.
        UnsupportedError: the adapters differ in a setting, or the strength isn't 1.
    """
    said = of_config(adapters, "decomposition", "para", method="DEFT")
    r = clamped_rank(adapters, "DEFT", lambda site: site.d_out)
    tensors: dict[str, dict[str, Tensor]] = {}
    for a in adapters:
        for path, held in a.items():
            if held["lora_gain"] != 1:
                raise UnsupportedError(
                    f"to_peft: {path!r}: PEFT's DEFT has no strength, found "
                    f"{held['lora_gain'].item():g}; merge it"
                )
            tensors[path] = {"deft_P": held["lora_P"]}
            if not said["para"]:
                entry = ModuleEntry(path, {}, a.sites[path], modules.get(path))
                R = _filled(entry, held) * _turned(held["lora_P"], said["decomposition"])[:, None]
                tensors[path]["deft_R"] = R.to(held["lora_R"].dtype)
    fields = {"decomposition_method": said["decomposition"], "para": said["para"], "alpha": None}
    return Written(fields | {"r": r, "deft_dropout": 0.0}, tensors)


def _filled(entry: ModuleEntry, held: Mapping[str, Tensor]) -> Tensor:
    """Return R = right0^T W + rho."""
    if not held["lora_right0"].any():
        return held["lora_R"]
    W = entry.weight("DEFT's start")
    return held["lora_right0"].to(W).mT @ W + held["lora_R"].to(W)


DEFT = Codec(
    peft_type="DEFT",
    configs=(DEFTConfig,),
    suffixes=("deft_P", "deft_R"),
    understood="r decomposition_method alpha para",
    read=read,
    write=write,
    ignored="init_scale",
    biased="deft_only",
    transposed=True,
)
