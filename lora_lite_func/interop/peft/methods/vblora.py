"""PEFT's VB-LoRA: logits of each module around one bank of vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, short_repr
from ....variants import VBLoRAConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, one_of, ranks
from .shared_projections import common_leaf, shared_tensor
from .tensor_names import same

__all__ = ["VBLORA"]

_BANK = "vblora_vector_bank"
_NEVER = -1e4
"""A logit that is below that of any weight, for vectors of which a file doesn't keep the logits."""


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read vblora_logits_A (r, d_in / v, h) and vblora_logits_B (d_out / v, r, h), or what
    save_only_topk_weights leaves of them, with the shared vblora_vector_bank (h, v).

    Raises:
        CheckpointError: the bank is missing, or an index is none of its vectors.
        ModelNeededError: no model was given.
    """
    entry.known("VB-LoRA has logits of sub-vectors")
    bank, k = shared_tensor(reader, entry, _BANK), reader.whole("topk", 2)
    h, v = bank.shape
    leaves = {"lora_bank": bank, "lora_gain": torch.ones((), dtype=bank.dtype)}
    for side in "AB":
        name = f"vblora_logits_{side}"
        leaves[f"lora_logits_{side}"] = (
            held[name] if name in held else _spread(held, name, entry, h)
        )
    fields = {
        "num_vectors": h,
        "vector_length": v,
        "topk": k,
        "dropout": reader.number("vblora_dropout", 0.0),
    }
    return [Part(VBLoRAConfig, leaves, fields, leaves["lora_logits_A"].shape[0])]


def _spread(held: Mapping[str, Tensor], name: str, entry: ModuleEntry, h: int) -> Tensor:
    """Return logits (..., h) of the chosen vectors' numbers (..., k) and weights (..., k - 1)."""
    where, weights = held[f"{name}_topk_indices"].long(), held[f"{name}_topk_weights"]
    if bool(((where < 0) | (where >= h)).any()):
        raise CheckpointError(
            f"{short_repr(entry.path)}: {name}_topk_indices: expected numbers of {h} vectors"
        )
    last = 1.0 - weights.sum(-1, keepdim=True)
    tiny = torch.finfo(weights.dtype).tiny
    logits = torch.cat([weights, last], -1).clamp_min(tiny).log()
    return weights.new_full((*where.shape[:-1], h), _NEVER).scatter(-1, where, logits)


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write the logits of each site, and the bank.

    Raises:
        UnsupportedError: the adapters differ in a setting or in the bank, or the sites in r.
    """
    names = ("num_vectors", "vector_length", "topk", "dropout")
    said = of_config(adapters, *names, method="VB-LoRA")
    bank = common_leaf(adapters, "lora_bank", "VB-LoRA")
    fields = {
        "r": one_of(ranks(adapters)[0], "VB-LoRA", "r"),
        "num_vectors": said["num_vectors"],
        "vector_length": said["vector_length"],
        "topk": said["topk"],
        "vblora_dropout": said["dropout"],
        "save_only_topk_weights": False,
    }
    tensors = same(adapters, lora_logits_A="vblora_logits_A", lora_logits_B="vblora_logits_B")
    return Written(fields, tensors, {_BANK: bank})


def _is_plain(adapter: Adapter) -> bool:
    """Tell whether a file can hold an adapter: without a strength and a start to subtract."""
    if adapter.config.exact_start:  # type: ignore[attr-defined]
        return False
    return all(bool((held["lora_gain"] == 1.0).all()) for held in adapter.values())


VBLORA = Codec(
    peft_type="VBLORA",
    configs=(VBLoRAConfig,),
    suffixes=(
        "vblora_logits_A",
        "vblora_logits_B",
        "vblora_logits_A_topk_indices",
        "vblora_logits_A_topk_weights",
        "vblora_logits_B_topk_indices",
        "vblora_logits_B_topk_weights",
    ),
    understood="r num_vectors vector_length topk vblora_dropout save_only_topk_weights",
    ignored="init_vector_bank_bound init_logits_std",
    read=read,
    write=write,
    shared=(_BANK,),
    biased="vblora_only",
    holds=_is_plain,
    transposed=True,
)
