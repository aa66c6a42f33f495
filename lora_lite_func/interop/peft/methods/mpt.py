"""PEFT's multitask prompt tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError
from ....layers.whole_calls import has_encoder
from ....variants import MPTConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from ..whole_model import only_one
from .prompt_tuning import ABOUT_MODEL, PROMPT_TUNING, TENSOR, virtual_tokens, written

__all__ = ["MPT"]

_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read prompt_embeddings (P, width), prefix_task_cols (tasks, P, k), prefix_task_rows (tasks,
    k, width). A file for a model that encodes and decodes has as many tokens for its decoder behind
    these, and their columns behind theirs.

    Raises:
        CheckpointError: there are fewer rows than the config says, or the model decodes nothing.
    """
    tokens, columns = virtual_tokens(reader, held), held[_COLUMNS]
    P, decodes = tokens.shape[0], (reader.get("num_transformer_submodules") or 1) != 1
    leaves = {"lora_tokens": tokens, "lora_columns": columns[:, :P], "lora_rows": held[_ROWS]}
    if decodes:
        if not has_encoder(entry.module):
            raise CheckpointError(
                f"{reader.where}: half of its virtual tokens are for a decoder, and "
                f"{type(entry.module).__name__} doesn't encode and decode; read it with the model "
                f"that it was trained on"
            )
        leaves |= {"lora_decoder": held[TENSOR][P:], "lora_decoder_columns": columns[:, P:]}
    fields = {"tasks": columns.shape[0], "task_rank": columns.shape[-1], "decoder": decodes}
    return [Part(MPTConfig, leaves, fields, P)]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write what the tasks share, and their factors; those for a decoder behind the others.

    Raises:
        UnsupportedError: PEFT has no one file for these adapters.
    """
    adapter, path = only_one(adapters, modules, "MULTITASK_PROMPT_TUNING")
    p, cfg = adapter[path], adapter.config
    tokens, columns = p["lora_tokens"], p["lora_columns"]
    fields = {
        "num_tasks": cfg.tasks,  # type: ignore[attr-defined]
        "num_ranks": cfg.task_rank,  # type: ignore[attr-defined]
    }
    tensors = {_COLUMNS: columns, _ROWS: p["lora_rows"]}
    if "lora_decoder" in p:
        fields["num_transformer_submodules"] = 2
        tensors[TENSOR] = torch.cat([tokens, p["lora_decoder"]])
        tensors[_COLUMNS] = torch.cat([columns, p["lora_decoder_columns"]], 1)
    return written(tokens, path, modules, fields, tensors)


MPT = Codec(
    peft_type="MULTITASK_PROMPT_TUNING",
    configs=(MPTConfig,),
    suffixes=(TENSOR, _COLUMNS, _ROWS),
    understood=f"num_virtual_tokens num_tasks num_ranks {ABOUT_MODEL}",
    ignored=f"{PROMPT_TUNING.ignored} prompt_tuning_init_state_dict_path prompt_tuning_init_task",
    read=read,
    write=write,
    kinds="call",
    of_whole_model=True,
)
