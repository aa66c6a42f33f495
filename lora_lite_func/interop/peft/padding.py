"""The padding row of a table, which an adapted embedding leaves as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.errors import CheckpointError, short_repr
from ...core.registry import variant_for
from ...layers.weights import stored
from ...variants import DoRAConfig, HiRAConfig
from ..assembly import ModuleEntry, Part
from ..metadata import ConfigReader
from .keys import elsewhere
from .modules import adaptable

__all__ = ["padding_checked"]


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
