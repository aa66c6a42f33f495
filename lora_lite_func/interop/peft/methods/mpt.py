"""PEFT's multitask prompt tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError
from ....variants import MPTConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from ..whole_model import only_one, said_of_model
from .prompt_tuning import ABOUT_MODEL, PROMPT_TUNING, TENSOR, virtual_tokens

__all__ = ["MPT"]

_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read prompt_embeddings (P, width), prefix_task_cols (tasks, P, k), prefix_task_rows (tasks,
    k, width).

    Raises:
        CheckpointError: the file has tokens for a decoder too.
    """
    if (reader.get("num_transformer_submodules") or 1) != 1:
        raise CheckpointError(
            f"{reader.where}: its decoder has virtual tokens of its own, which PEFT's own "
            f"generation leaves out; train it with num_transformer_submodules=1"
        )
    tokens, columns = virtual_tokens(reader, held), held[_COLUMNS]
    leaves = {"lora_tokens": tokens, "lora_columns": columns, "lora_rows": held[_ROWS]}
    fields = {"tasks": columns.shape[0], "task_rank": columns.shape[-1]}
    return [Part(MPTConfig, leaves, fields, tokens.shape[0])]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write what the tasks share, and their factors.

    Raises:
        UnsupportedError: PEFT has no one file for these adapters.
    """
    adapter, path = only_one(adapters, modules, "MULTITASK_PROMPT_TUNING")
    p, cfg = adapter[path], adapter.config
    tokens: Tensor = p["lora_tokens"]
    fields = {
        "num_virtual_tokens": tokens.shape[0],
        "token_dim": tokens.shape[1],
        "num_tasks": cfg.tasks,  # type: ignore[attr-defined]
        "num_ranks": cfg.task_rank,  # type: ignore[attr-defined]
    }
    tensors = {TENSOR: tokens, _COLUMNS: p["lora_columns"], _ROWS: p["lora_rows"]}
    return Written(fields | said_of_model(modules, path), {path: tensors})


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
