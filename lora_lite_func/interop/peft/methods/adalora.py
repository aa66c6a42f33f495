"""PEFT's AdaLoRA: factors with a weight for each direction, some of them pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import UnsupportedError
from ....variants import (
    AdaLoRAConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, ranks
from .tensor_names import columns_rows

__all__ = ["ADALORA"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read lora_A (r, d_in), lora_E (r, 1) and lora_B (d_out, r), where r is what pruning left. The
    update is alpha / (init_r + 1e-5) B diag(E) A. A module that lost all its directions gives no
    part.
    """
    A, E, B = held["lora_A"], held["lora_E"].flatten(), held["lora_B"]
    r, first = A.shape[0], reader.whole("init_r", 12)
    alpha = reader.number("lora_alpha", 8)
    if r == 0:
        return []  # all directions were pruned, so the layer is as in the base
    alpha = alpha if alpha > 0 else float(first)
    # lora_E is scaled so that our alpha / r gives PEFT's scale.
    leaves = {
        "lora_A": A,
        "lora_B": B,
        "lora_E": E * (r / (first + 1e-5)),
    }
    return [Part(AdaLoRAConfig, leaves, {"dropout": reader.number("lora_dropout", 0.0)}, r, alpha)]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write lora_A (r, d_in), lora_E (r, 1) and lora_B (d_out, r), with r the largest rank of all
    sites. Smaller ranks are padded with zeros.

    Raises:
        UnsupportedError: the adapters differ in dropout, or alpha isn't positive.
    """
    said, (r, alphas) = of_config(adapters, "dropout", method="AdaLoRA"), ranks(adapters)
    first, alpha = max(r.values()), next(iter(alphas.values()))
    if alpha <= 0:
        raise UnsupportedError(
            f"to_peft: PEFT's AdaLoRA takes alpha={alpha} for the rank; scale the adapter and "
            f"give it a positive one"
        )
    tensors = {}
    for a in adapters:
        # PEFT knows one first rank and what was pruned from it, so smaller ranks are padded.
        for (
            path,
            held,
        ) in a.items():
            E = held["lora_E"] * ((first + 1e-5) / r[path] * alphas[path] / alpha)
            more = first - r[path]
            A, B = F.pad(held["lora_A"], (0, 0, 0, more)), F.pad(held["lora_B"], (0, more))
            tensors[path] = {"lora_A": A, "lora_E": F.pad(E, (0, more))[:, None], "lora_B": B}
    fields: dict[str, Any] = {
        "init_r": first,
        "r": first,
        "target_r": first,
        "total_step": 1,
        "lora_dropout": said["dropout"],
    }
    return Written(fields | {"lora_alpha": alpha}, tensors)


ADALORA = Codec(
    biased="lora_only",
    prunes=True,
    peft_type="ADALORA",
    configs=(AdaLoRAConfig,),
    suffixes=("lora_A", "lora_B", "lora_E"),
    understood="r init_r lora_alpha lora_dropout rank_pattern trainable_token_indices",
    token_prefix="token_adapter.",
    read=read,
    write=write,
    sizes=columns_rows("lora_A", "lora_B"),
    unread="use_qalora use_bdlora alora_invocation_tokens layer_replication arrow_config "
    "kasa_config",
    ignored="target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step "
    "init_lora_weights loftq_config qalora_group_size use_rslora",
    kinds="linear conv2d",
    transposed=True,
)
