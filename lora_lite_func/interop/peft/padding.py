"""The padding row of a table, which an adapted embedding leaves as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import CheckpointError, short_repr
from ...core.registry import variant_for
from ...layers.weights import stored
from ...variants import DoRAConfig, HiRAConfig, LoRAConfig
from ..assembly import ModuleEntry, Part
from ..metadata import ConfigReader
from .keys import elsewhere
from .modules import adaptable

__all__ = ["as_one_table", "padding_checked"]

Parts = Sequence[tuple[ModuleEntry, Part]]


def padding_checked(
    reader: ConfigReader, entry: ModuleEntry, part: Part, model: Any
) -> ModuleEntry:
    """Return the place of an embedding's part. Where the part moves the padding row, that is the
    table itself, because an adapted module leaves this row as it is.

    Raises:
        CheckpointError: the table has other places, which would move too.
    """
    padding = getattr(entry.module, "padding_idx", None) if entry.kind == "embedding" else None
    if padding is None or not _moves(part, padding, stored(entry.module, "weight")):
        return entry
    modules = dict(model.named_modules(remove_duplicate=False))
    table = f"{entry.path}.weight"
    if "parameter" not in variant_for(part.config).sites or elsewhere(modules, table):
        raise CheckpointError(
            f"{reader.where}: {short_repr(entry.path)}: changes the row of id {padding}, "
            f"padding, which stays as it is here"
        )
    return ModuleEntry(table, entry.shared, *adaptable(model, [table])[table])


def as_one_table(parts: Parts, model: Any) -> Parts:
    """Return parts in which a table that PEFT changes alike in all its places (an embedding, and
    heads that share its weight: ensure_weight_tying) is one site where its padding row moves.
    """
    if model is None:
        return parts
    modules = dict(model.named_modules(remove_duplicate=False))
    by_path = {entry.path: part for entry, part in parts}
    # {path of a place: the table's, or None where another place has it}
    single: dict[str, str | None] = {}
    for entry, part in parts:
        padding = getattr(entry.module, "padding_idx", None) if entry.kind == "embedding" else None
        if padding is None or not _moves(part, padding, stored(entry.module, "weight")):
            continue
        table = f"{entry.path}.weight"
        heads = [other.rpartition(".")[0] for other in elsewhere(modules, table)]
        if heads and all(_same_change(part, by_path.get(head)) for head in heads):
            single |= dict.fromkeys(heads) | {entry.path: table}
    found = []
    for entry, part in parts:
        place = single.get(entry.path, entry.path)
        if place is None:
            continue
        if place != entry.path:
            entry = ModuleEntry(place, entry.shared, *adaptable(model, [place])[place])
        found.append((entry, part))
    return found


def _same_change(table: Part, head: Part | None) -> bool:
    """Tell whether a head's LoRA is an embedding's, with the factors turned around."""
    if head is None or not table.config is head.config is LoRAConfig:
        return False
    A, B = table.leaves["lora_A"], table.leaves["lora_B"]
    return torch.equal(A.mT, head.leaves["lora_B"]) and torch.equal(B.mT, head.leaves["lora_A"])


def _moves(part: Part, padding: int, table: Any) -> bool:
    """Tell whether a part changes the padding row of a table (ids, features)."""
    A, ids = part.leaves.get("lora_A"), part.leaves.get("lora_ids")
    if not isinstance(table, Tensor) or (
        A is not None and (A.ndim != 2 or A.shape[1] != len(table))
    ):
        return False  # the code that fits the tensors refuses a wrong shape
    if ids is not None:
        return bool((part.leaves["lora_rows"][ids == padding] != 0).any())
    if A is None:
        return False
    update, row = bool((A[:, padding] != 0).any()), bool((table[padding] != 0).any())
    return {HiRAConfig: update and row, DoRAConfig: update or row}.get(part.config, update)
