"""PEFT's prompt tuning: embeddings of virtual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError
from ....variants import PromptTuningConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from ..whole_model import only_one, said_of_model

__all__ = ["ABOUT_MODEL", "PROMPT_TUNING", "TENSOR", "read", "virtual_tokens", "written"]

TENSOR = "prompt_embeddings"
ABOUT_MODEL = "token_dim num_layers num_attention_heads num_transformer_submodules"
"""Fields of the model, which the tensors' shapes say too."""


def virtual_tokens(reader: ConfigReader, held: Mapping[str, Tensor]) -> Tensor:
    """Return the virtual tokens' rows (P, ...) of a file. One for a model that encodes and decodes
    has as many again behind them, which PEFT leaves unused.

    Raises:
        CheckpointError: there are fewer rows than the config says.
    """
    rows = held[TENSOR]
    count = reader.whole("num_virtual_tokens", rows.shape[0])
    submodules = reader.get("num_transformer_submodules") or 1
    if rows.ndim != 2 or rows.shape[0] != count * submodules:
        raise CheckpointError(
            f"{reader.where}: num_virtual_tokens is {count}, for {submodules} parts of a model; "
            f"{TENSOR} is {tuple(rows.shape)}"
        )
    return rows[:count]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read prompt_embeddings (P, width)."""
    tokens = virtual_tokens(reader, held)
    return [Part(PromptTuningConfig, {"lora_tokens": tokens}, r=tokens.shape[0])]


def written(
    tokens: Tensor,
    path: str,
    modules: Mapping[str, Any],
    fields: Mapping[str, Any] = MappingProxyType({}),
    tensors: Mapping[str, Tensor] = MappingProxyType({}),
) -> Written:
    """Make a file of virtual tokens, with what each such file says of its model.

    Args:
        tokens: (P, width).
        path: the path of the model that they are for.
        modules: {path: module}.
        fields: what the method's own config says.
        tensors: the method's other tensors.
    """
    size = {"num_virtual_tokens": tokens.shape[0], "token_dim": tokens.shape[1]}
    said = size | said_of_model(modules, path) | dict(fields)
    return Written(said, {path: {TENSOR: tokens, **tensors}})


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write the tokens, and what PEFT takes from the model.

    Raises:
        UnsupportedError: PEFT has no one file for these adapters.
    """
    adapter, path = only_one(adapters, modules, "PROMPT_TUNING")
    if adapter.config.decoder:  # type: ignore[attr-defined]
        raise UnsupportedError(
            "to_peft: decoder=True: PEFT's prompt tuning leaves the decoder's virtual tokens out; "
            "train with ll.MPTConfig(decoder=True), whose file has them, or without them"
        )
    return written(adapter[path]["lora_tokens"], path, modules)


PROMPT_TUNING = Codec(
    peft_type="PROMPT_TUNING",
    configs=(PromptTuningConfig,),
    suffixes=(TENSOR,),
    understood=f"num_virtual_tokens {ABOUT_MODEL}",
    ignored="prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs",
    read=read,
    write=write,
    kinds="call",
    of_whole_model=True,
)
