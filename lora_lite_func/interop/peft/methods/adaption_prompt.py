"""PEFT's adaption prompt, which is LLaMA-Adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError
from ....layers.attention import is_attention
from ....variants import LLaMAAdapterConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written

__all__ = ["ADAPTION_PROMPT"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read adaption_prompt (1, P, d), adaption_gate (1,).

    Raises:
        CheckpointError: the file lacks layers, or the output projection has a bias, which PEFT adds
            once more.
        ModelNeededError: no model was given.
    """
    entry.known("an attention's sizes are its projections'")
    count = reader.whole("adapter_layers", entry.count)
    if count != entry.count:
        raise CheckpointError(
            f"{reader.where}: adapter_layers is {count}, there are tensors of {entry.count} layers"
        )
    _check_bias(entry.module, f"{reader.where}: {entry.path!r}", CheckpointError)
    prompt = held["adaption_prompt"].squeeze(0)
    leaves = {"lora_prompt": prompt, "lora_gate": held["adaption_gate"].reshape(())}
    return [Part(LLaMAAdapterConfig, leaves, r=prompt.shape[0])]


def _check_bias(module: Any, where: str, error: type[Exception]) -> None:
    if getattr(module.o_proj, "bias", None) is not None:
        raise error(
            f"{where}: its output projection has a bias, which PEFT's ADAPTION_PROMPT adds a "
            f"second time"
        )


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write the prompts and gates of the topmost attentions.

    Raises:
        CheckpointError: no model was given.
        UnsupportedError: prompts of unlike lengths, other attentions than the topmost, or a model
            that PEFT gets wrong.
    """
    if not modules:
        raise CheckpointError(
            "to_peft: PEFT's ADAPTION_PROMPT counts the model's attentions from the top; give the "
            "base model"
        )
    held = {path: (a.sites[path].r, h) for a in adapters for path, h in a.items()}
    every = [path for path, module in modules.items() if is_attention(module)]
    ending = next(iter(held)).rpartition(".")[2]
    top = [path for path in every if re.search(rf"(^|\.){ending}$", path)][-len(held) :]
    lengths = {r for r, _ in held.values()}
    if set(top) != set(held) or len(lengths) != 1:
        raise UnsupportedError(
            f"to_peft: PEFT's ADAPTION_PROMPT has prompts of one length in the topmost attentions, "
            f"these are of {sorted(lengths)} in {', '.join(map(repr, list(held)[:3]))}"
        )
    for path in held:
        module = modules[path]
        _check_bias(module, f"to_peft: {path!r}", UnsupportedError)
        groups = getattr(module, "num_key_value_groups", 1)
        if module.k_proj.in_features // module.k_proj.out_features != groups:
            raise UnsupportedError(
                f"to_peft: {path!r}: {groups} of its heads share keys, which PEFT's "
                f"ADAPTION_PROMPT infers from sizes, {module.k_proj.in_features} and "
                f"{module.k_proj.out_features}, and gets wrong"
            )
    fields = {"adapter_len": lengths.pop(), "adapter_layers": len(held)}
    tensors = {
        path: {
            "adaption_prompt": h["lora_prompt"][None],
            "adaption_gate": h["lora_gate"].reshape(1),
        }
        for path, (_, h) in held.items()
    }
    about = {"target_modules": ending, "task_type": "CAUSAL_LM"}
    return Written(fields | about, tensors)


ADAPTION_PROMPT = Codec(
    peft_type="ADAPTION_PROMPT",
    configs=(LLaMAAdapterConfig,),
    suffixes=("adaption_prompt", "adaption_gate"),
    understood="adapter_len adapter_layers",
    read=read,
    write=write,
    kinds="attention",
    keeps_modules=False,
    names_ending=True,
)
