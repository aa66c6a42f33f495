"""load_into: an adapter's file or folder straight into a slot of a bank."""

from __future__ import annotations

import os

from torch import nn

from ..algebra.bank import Bank
from ..core.adapter import Adapter
from ..core.errors import CheckpointError, StructureError
from ..io.checkpoint import read_mapped
from .open import form_of, open_adapter
from .renaming import Rename

__all__ = ["load_into"]


def load_into(
    bank: Bank,
    name: str,
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    rename: Rename | None = None,
) -> None:
    """Read an adapter from the disk into a bank, under a new name or in the place of the one that
    has it. All is checked before anything is written, as `ll.load` and `ll.from_peft` check it.

    Of a file of `ll.save` the slot gets the bytes without a copy in between.

    Args:
        bank: the bank.
        name: the adapter's name in it.
        path: a file of `ll.save`, PEFT's folder, or another file that the command line takes.
        model: the base that the adapter should fit; files of diffusion models need it.
        rename: for paths that have moved, as in `ll.from_peft`.

    Raises:
        CheckpointError: the file can't be read, doesn't fit the model, or holds several adapters.
        StructureError: the adapter doesn't stack with the others.
        UnsupportedError: inside a transform or a compiled call.
    """
    if not isinstance(bank, Bank):
        raise StructureError(f"load_into: expected a Bank, found {type(bank).__name__}")
    if form_of(path) == "ll" and rename is None:
        found = read_mapped(path, model)
    else:
        found = open_adapter(path, model, rename=rename)
    if isinstance(found, (tuple, list)) and len(found) == 1:
        found = found[0]
    if not isinstance(found, Adapter):
        raise CheckpointError(
            f"{os.fsdecode(path)}: holds {len(found)} adapters, and a place in a bank takes one; "
            f"a bank for each of them serves them together, ll.apply(model, (ll.rows(b1, ids), "
            f"ll.rows(b2, ids)), x)"
        )
    if name in bank:
        bank.replace(name, found)
    else:
        bank.add(name, found)
