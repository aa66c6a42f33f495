"""What a file holds, as JSON types and back: an adapter, a stack, or several under names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.adapter import ABSENT, Adapter
from ..core.config import LARGEST
from ..core.errors import CheckpointError, nearest, short_repr
from ..core.layout import Layout, Stacked, from_json, to_json
from ..core.site import Site

__all__ = ["Contents", "Piece", "contents", "describe_all", "described_all", "joined"]

_FORMAT = 1
_CONTAINERS: Mapping[str, Any] = {"tuple": tuple, "list": list, "dict": dict}


@dataclass
class Piece:
    """One adapter or stack in a file.

    Attributes:
        prefix: in front of its keys; "" where it is alone.
        layout: its static data (of one member, if it is a stack).
        data: {path: {lora_name: tensor}}; empty where nothing is read yet.
        count: members of the stack; 0 for a plain adapter.
    """

    prefix: str
    layout: Layout
    data: Mapping[str, Mapping[str, Any]]
    count: int = 0

    def shape(self, path: str, name: str) -> tuple[int, ...]:
        """Of a tensor as it is stored."""
        shape = self.layout.specs[path][name].shape
        return (self.count, *shape) if self.count else shape


def joined(prefix: str, path: str, name: str) -> str:
    """The key of a tensor."""
    return prefix + (f"{path}.{name}" if path else name)


# ------------------------------------------------------------------------------------------ writing
def contents(params: Any) -> list[Piece]:
    """The adapters to write, with their prefixes.

    Raises:
        CheckpointError: something that isn't an adapter, or a tuple, list or dict of them.
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
    if isinstance(layout, Stacked) and not count:  # one adapter, made of the members of a stack
        layout = layout.alone()
    if layout is None:
        raise CheckpointError(
            "save: one adapter made of a stack whose members' strengths differ (alpha / r) has no "
            "strength that a file could say; make it of their updates, "
            "ll.combine_adapters(ll.unstack(stack), weights)"
        )
    return Piece(prefix, layout, params._data, count)


def describe_all(params: Any, pieces: Sequence[Piece]) -> dict[str, Any]:
    """What the file says of itself."""
    parts = [_description(piece) for piece in pieces]
    if isinstance(params, Adapter):
        return parts[0]
    container = (
        "dict" if isinstance(params, Mapping) else "list" if isinstance(params, list) else "tuple"
    )
    return {
        "format": _FORMAT,
        "parts": parts,
        "as": container,
        "names": [piece.prefix[:-1] for piece in pieces],
    }


def _description(piece: Piece) -> dict[str, Any]:
    layout = piece.layout
    if not isinstance(layout, Stacked):
        return to_json(layout) | ({"stack": piece.count} if piece.count else {})
    kinds: list[Layout] = []  # equal members are described once
    for member in layout.members:
        if not any(k is member for k in kinds):
            kinds.append(member)
    which = [next(i for i, k in enumerate(kinds) if k is member) for member in layout.members]
    labels = None if layout.labels is None else list(layout.labels)
    return {
        "format": _FORMAT,
        "members": [to_json(k) for k in kinds],
        "which": which,
        "labels": labels,
    }


# ------------------------------------------------------------------------------------------ reading
@dataclass(frozen=True)
class Contents:
    """What a file says it holds.

    Attributes:
        pieces: its adapters and stacks.
        container: "tuple", "list", "dict"; None for one alone.
    """

    pieces: list[Piece]
    container: str | None

    def chosen(self, member: int | str | None) -> tuple[Contents, int | None]:
        """(the part of the contents to read, the row of its stack to read).

        Raises:
            CheckpointError: no such member.
        """
        if member is None:
            return self, None
        if hasattr(member, "__index__") and not isinstance(member, bool):
            member = member.__index__()
        if self.container is None:
            return self, self._row(member)
        names = [piece.prefix[:-1] for piece in self.pieces]
        by_number = type(member) is int and -len(names) <= member < len(names)
        name = names[member] if by_number else member  # type: ignore[index]
        if name not in names:
            raise CheckpointError(
                f"member: the file holds no {short_repr(member)}; {nearest(str(member), names)}"
            )
        return Contents([self.pieces[names.index(str(name))]], None), None

    def _row(self, member: int | str) -> int:
        """A member's place in a stack that is alone in the file."""
        piece = self.pieces[0]
        labels = getattr(piece.layout, "labels", None) or ()
        index = labels.index(member) if isinstance(member, str) and member in labels else member
        if type(index) is not int or not -piece.count <= index < piece.count:
            what = f"a stack of {piece.count}" if piece.count else "one adapter"
            raise CheckpointError(f"member: the file holds {what}, found {short_repr(member)}")
        return index % piece.count

    def put_together(self, made: list[Adapter]) -> Any:
        """What was saved."""
        if self.container is None:
            return made[0]
        if self.container == "dict":
            return {
                piece.prefix[:-1]: adapter for piece, adapter in zip(self.pieces, made, strict=True)
            }
        return _CONTAINERS[self.container](made)


def described_all(says: Any, stored: Iterable[str]) -> tuple[dict[str, str], Contents]:
    """({key: the key that it shares a tensor with}, contents); hostile until shown otherwise.

    Raises:
        CheckpointError: anything that `describe_all` doesn't write.
    """
    stored = set(stored)
    if not isinstance(says, dict):
        raise CheckpointError(f"its metadata: expected an object, found {type(says).__name__}")
    says = dict(says)
    same = says.pop("same", {})
    if not isinstance(same, dict) or not all(
        isinstance(v, str) and v in stored and k not in stored for k, v in same.items()
    ):
        raise CheckpointError(
            f"same: expected pairs of keys, the second one a stored tensor's, found "
            f"{short_repr(same)}"
        )
    most = len(stored) + len(same)
    if "parts" not in says:
        return same, Contents([_described("", says, most)], None)
    version, parts, container, names = (says.get(k) for k in ("format", "parts", "as", "names"))
    if type(version) is not int or version != _FORMAT:
        raise CheckpointError(
            f"expected format version {_FORMAT}, found {short_repr(version)}; a newer release "
            f"may read it"
        )
    if (
        says.keys() != {"format", "parts", "as", "names"}
        or not isinstance(container, str)
        or container not in _CONTAINERS
    ):
        raise CheckpointError(
            f"several parts: expected format, parts, as (tuple, list or dict) and names, found "
            f"{short_repr(says)}"
        )
    if (
        not isinstance(parts, list)
        or not isinstance(names, list)
        or len(parts) != len(names)
        or not 0 < len(parts) <= most
    ):
        raise CheckpointError(
            f"several parts: expected as many names as parts, and tensors for each, found "
            f"{short_repr(names)}"
        )
    numbers = [str(i) for i in range(len(parts))]
    if (
        not all(isinstance(n, str) and "/" not in n for n in names)
        or len(set(names)) != len(names)
        or (container != "dict" and names != numbers)
    ):
        raise CheckpointError(
            f"names: expected different names (numbers from 0, unless it is a dict), found "
            f"{short_repr(names)}"
        )
    return same, Contents(
        [_described(f"{name}/", part, most) for name, part in zip(names, parts, strict=True)],
        container,
    )


def _unlike(prefix: str, says: Mapping[str, Any], most: int) -> Piece:
    """A stack whose members differ."""
    kinds, which, labels = says.get("members"), says.get("which"), says.get("labels")
    if (
        says.keys() != {"format", "members", "which", "labels"}
        or not isinstance(kinds, list)
        or not isinstance(which, list)
    ):
        raise CheckpointError(
            f"a stack of unlike members: expected format, members, which and labels, found "
            f"{short_repr(says)}"
        )
    if (
        not which
        or len(kinds) > len(which)
        or not all(type(i) is int and 0 <= i < len(kinds) for i in which)
    ):
        raise CheckpointError(
            f"which: expected a member's description for each, found {short_repr(which)}"
        )
    if labels is not None and (
        not isinstance(labels, list)
        or len(labels) != len(which)
        or not all(isinstance(v, str) for v in labels)
    ):
        raise CheckpointError(
            f"labels: expected a name for each member, found {short_repr(labels)}"
        )
    layouts = [from_json(kind, most=most) for kind in kinds]
    first = layouts[0]
    for layout in layouts:
        alike = layout.variant is first.variant and layout.names == first.names
        if not alike or any(
            _place(site) != _place(first.sites[path]) for path, site in layout.sites.items()
        ):
            raise CheckpointError(
                "members: expected one method on the same places for all of a stack"
            )
    return Piece(prefix, Stacked([layouts[i] for i in which], labels), {}, len(which))


def _place(site: Site) -> Any:
    return dataclasses.replace(site, r=1, alpha=0.0, scaling=0.0)


def _described(prefix: str, says: Any, most: int) -> Piece:
    count = 0
    if isinstance(says, dict) and "members" in says:
        return _unlike(prefix, says, most)
    if isinstance(says, dict) and "stack" in says:
        says = dict(says)
        count = says.pop("stack")
        if type(count) is not int or not 0 < count <= LARGEST:
            raise CheckpointError(f"stack: expected how many members, found {short_repr(count)}")
    return Piece(prefix, from_json(says, most=most), {}, count)
