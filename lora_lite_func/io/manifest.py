"""What goes into a file, piece by piece and as JSON types: an adapter, a stack, or several
of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.absent import ABSENT
from ..core.adapter import Adapter
from ..core.errors import CheckpointError, short_repr
from ..core.layout import Layout, to_json
from ..core.stacked import Stacked

__all__ = ["CONTAINERS", "FORMAT", "Piece", "joined", "pieces_of", "pieces_to_json"]

FORMAT = 1
CONTAINERS: Mapping[str, Any] = {"tuple": tuple, "list": list, "dict": dict}


@dataclass
class Piece:
    """One adapter or stack in a file.

    Attributes:
        prefix: what stands in front of its keys; "" where it is alone.
        layout: its static data, which for a stack is that of one member.
        data: {path: {lora_name: tensor}}, empty where nothing has been read yet.
        count: the number of members of a stack; 0 for a plain adapter.
    """

    prefix: str
    layout: Layout
    data: Mapping[str, Mapping[str, Any]]
    count: int = 0

    def shape(self, path: str, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor as it is stored."""
        shape = self.layout.specs[path][name].shape
        return (self.count, *shape) if self.count else shape


def joined(prefix: str, path: str, name: str) -> str:
    """Return the key of a tensor."""
    return prefix + (f"{path}.{name}" if path else name)


def pieces_of(params: Any) -> list[Piece]:
    """Return the adapters to write, with their prefixes.

    Raises:
        CheckpointError: `params` is neither an adapter nor a tuple, list or dict of adapters.
    """
    if isinstance(params, Adapter):
        return [_piece("", params)]
    if isinstance(params, Mapping):
        named = list(params.items())
    elif isinstance(params, (tuple, list)):
        named = [(str(i), part) for i, part in enumerate(params)]
    else:
        raise CheckpointError(
            f"save: expected one Adapter, or a tuple, list or dict of them, found "
            f"{type(params).__name__}"
        )
    for name, part in named:
        if not isinstance(name, str) or not isinstance(part, Adapter):
            raise CheckpointError(
                f"save: expected Adapters under names, found {type(part).__name__} under "
                f"{short_repr(name)}"
            )
        if "/" in name:
            raise CheckpointError(f"save: expected names without '/', found {short_repr(name)}")
    if not named:
        raise CheckpointError("save: expected at least one Adapter, found none")
    return [_piece(f"{name}/", part) for name, part in named]


def _piece(prefix: str, params: Adapter) -> Piece:
    first = next(
        ((p, n, t) for p, held in params._data.items() for n, t in held.items() if t is not ABSENT),
        None,
    )
    count = 0
    if first is not None and isinstance(first[2], Tensor):
        path, name, leaf = first
        expected = params.layout.specs[path][name].shape
        if leaf.ndim == len(expected) + 1 and tuple(leaf.shape[1:]) == expected:
            count = leaf.shape[0]
    layout: Layout | None = params.layout
    if isinstance(layout, Stacked) and not count:  # it is one adapter, made of a stack's members
        layout = layout.alone()
    if layout is None:
        raise CheckpointError(
            "save: one adapter made of a stack whose members' strengths differ (alpha / r), or "
            "whose sites do, has no layout that a file could say; make it of their updates, "
            "ll.combine_adapters(ll.unstack(stack), weights)"
        )
    return Piece(prefix, layout, params._data, count)


def pieces_to_json(params: Any, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return what the file says of itself."""
    parts = [_description(piece) for piece in pieces]
    if isinstance(params, Adapter):
        return parts[0]
    container = (
        "dict" if isinstance(params, Mapping) else "list" if isinstance(params, list) else "tuple"
    )
    return {
        "format": FORMAT,
        "parts": parts,
        "as": container,
        "names": [piece.prefix[:-1] for piece in pieces],
    }


def _description(piece: Piece) -> dict[str, Any]:
    layout = piece.layout
    if not isinstance(layout, Stacked):
        return to_json(layout) | ({"stack": piece.count} if piece.count else {})
    kinds: list[Layout] = []  # members with equal layouts are described once
    for member in layout.members:
        if not any(k is member for k in kinds):
            kinds.append(member)
    which = [next(i for i, k in enumerate(kinds) if k is member) for member in layout.members]
    if not all(member.sites for member in layout.members):
        raise CheckpointError(
            "save: the snapshot of a bank has free places, which no file keeps; save bank.stack()"
        )
    labels = None if layout.labels is None else list(layout.labels)
    return {
        "format": FORMAT,
        "members": [to_json(k) for k in kinds],
        "which": which,
        "labels": labels,
    }
