"""PEFT's context-aware prompt tuning, whose files hold the moved tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError
from ....layers.whole_calls import TokenTable
from ....variants import CPTConfig
from ....variants.cpt import virtual
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from ..whole_model import only_one
from .prompt_tuning import ABOUT_MODEL, TENSOR, virtual_tokens, written

__all__ = ["CPT"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read prompt_embeddings (P, width), and how far they are from the tokens of cpt_token_ids.

    Raises:
        CheckpointError: not as many ids or types as tokens, or an id that the model hasn't.
    """
    tokens = virtual_tokens(reader, held)
    ids, types = reader.ids("cpt_token_ids"), reader.ids("cpt_tokens_type_mask")
    types = types or (1,) * len(ids)
    table = TokenTable(entry.module)
    if not len(ids) == len(types) == tokens.shape[0] or max(ids) >= table.size:
        raise CheckpointError(
            f"{reader.where}: expected a cpt_token_id below {table.size} and a type for each of "
            f"{tokens.shape[0]} tokens, found {len(ids)} and {len(types)}"
        )
    where = torch.tensor(ids), torch.tensor(types)
    start = table(where[0]).cpu()
    leaves = {
        "lora_delta": tokens.float() - start,
        "lora_start": start,
        "lora_ids": where[0].float(),
        "lora_types": where[1].float(),
    }
    weighted = reader.get("opt_weighted_loss_type") == "decay"
    decay = reader.number("opt_loss_decay_factor", 1.0) if weighted else 1.0
    fields = {
        "token_ids": ids,
        "token_types": types,
        "epsilon": reader.number("opt_projection_epsilon", 0.1),
        "format_epsilon": reader.number("opt_projection_format_epsilon", 0.1),
        "decay": decay,
    }
    return [Part(CPTConfig, leaves, fields, len(ids))]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write the moved tokens, and what they were.

    Raises:
        UnsupportedError: PEFT has no one file for these adapters.
    """
    adapter, path = only_one(adapters, modules, "CPT")
    cfg: Any = adapter.config
    p = adapter[path]
    tokens = virtual(cfg, p, adapter.sites[path])
    fields = {
        "cpt_token_ids": p["lora_ids"].long().tolist(),
        "cpt_mask": [1] * tokens.shape[0],
        "cpt_tokens_type_mask": p["lora_types"].long().tolist(),
        "opt_projection_epsilon": cfg.epsilon,
        "opt_projection_format_epsilon": cfg.format_epsilon,
        "opt_weighted_loss_type": "none" if cfg.decay == 1.0 else "decay",
        "opt_loss_decay_factor": cfg.decay,
    }
    return written(tokens, path, modules, fields)


CPT = Codec(
    peft_type="CPT",
    configs=(CPTConfig,),
    suffixes=(TENSOR,),
    understood=f"num_virtual_tokens cpt_token_ids cpt_tokens_type_mask {ABOUT_MODEL}",
    ignored="cpt_mask opt_weighted_loss_type opt_loss_decay_factor opt_projection_epsilon "
    "opt_projection_format_epsilon tokenizer_name_or_path",
    read=read,
    write=write,
    kinds="call",
    of_whole_model=True,
)
