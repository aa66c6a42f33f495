"""What a file says that it holds. Nothing in it is believed until it has been checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.adapter import Adapter
from ..core.config_values import LARGEST
from ..core.errors import CheckpointError, ConfigError, nearest, short_repr
from ..core.layout import Layout, from_json
from ..core.site import Site
from ..core.stacked import Stacked
from .manifest import CONTAINERS, FORMAT, Piece

__all__ = ["Contents", "contents_from_json"]


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
        """Return the part of the contents to read, and the row of its stack to read.

        Raises:
            CheckpointError: the file has no such member.
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
        """Return a member's place in a stack that is alone in the file."""
        piece = self.pieces[0]
        labels = getattr(piece.layout, "labels", None) or ()
        index = labels.index(member) if isinstance(member, str) and member in labels else member
        if type(index) is not int or not -piece.count <= index < piece.count:
            what = f"a stack of {piece.count}" if piece.count else "one adapter"
            raise CheckpointError(f"member: the file holds {what}, found {short_repr(member)}")
        return index % piece.count

    def put_together(self, made: list[Adapter]) -> Any:
        """Return what was saved: the adapter alone, or the adapters in the container they were
        saved in.
        """
        if self.container is None:
            return made[0]
        if self.container == "dict":
            return {
                piece.prefix[:-1]: adapter for piece, adapter in zip(self.pieces, made, strict=True)
            }
        return CONTAINERS[self.container](made)


def contents_from_json(says: Any, stored: Iterable[str]) -> tuple[dict[str, str], Contents]:
    """Return {key: the key that it shares a tensor with} and the contents. Everything is checked
    before it is believed.

    Raises:
        CheckpointError: the JSON has anything that `pieces_to_json` doesn't write.
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
    if "parts" in says:
        return same, _several(says, most)
    return same, Contents([_piece("", says, most)], None)


def _several(says: Mapping[str, Any], most: int) -> Contents:
    version, container = says.get("format"), says.get("as")
    parts: Any = says.get("parts")
    names: Any = says.get("names")
    if type(version) is not int or version != FORMAT:
        raise CheckpointError(
            f"expected format version {FORMAT}, found {short_repr(version)}; a newer release "
            f"may read it"
        )
    fields = says.keys() == {"format", "parts", "as", "names"}
    if not fields or not isinstance(container, str) or container not in CONTAINERS:
        raise CheckpointError(
            f"several parts: expected format, parts, as (tuple, list or dict) and names, found "
            f"{short_repr(says)}"
        )
    lists = isinstance(parts, list) and isinstance(names, list)
    if not lists or len(parts) != len(names) or not 0 < len(parts) <= most:
        raise CheckpointError(
            f"several parts: expected as many names as parts, and tensors for each, found "
            f"{short_repr(names)}"
        )
    numbers = [str(i) for i in range(len(parts))]
    words = all(isinstance(n, str) and "/" not in n for n in names)
    if not words or len(set(names)) != len(names) or (container != "dict" and names != numbers):
        raise CheckpointError(
            f"names: expected different names (numbers from 0, unless it is a dict), found "
            f"{short_repr(names)}"
        )
    pieces = [_piece(f"{name}/", part, most) for name, part in zip(names, parts, strict=True)]
    return Contents(pieces, container)


def _unlike(prefix: str, says: Mapping[str, Any], most: int) -> Piece:
    """Return the piece of a stack whose members differ, after checking its description."""
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
    first: dict[str, Layout] = {}  # the first member that has a site
    for layout in layouts:
        for path, site in layout.sites.items():
            other = first.setdefault(path, layout)
            alike = layout.variant is other.variant and layout.names[path] == other.names[path]
            alike = alike and layout.shared.get(path) == other.shared.get(path)
            if not alike or _place(site) != _place(other.sites[path]):
                raise CheckpointError(
                    "members: expected one method, and what they share at the same places, for "
                    "all of a stack"
                )
    if any(layout.variant is not layouts[0].variant for layout in layouts):
        raise CheckpointError("members: expected one method for all of a stack")
    try:
        stacked = Stacked([layouts[i] for i in which], labels)
    except ConfigError as error:  # a tensor of a group can't be what each of them says
        raise CheckpointError(f"members: {error}") from None
    return Piece(prefix, stacked, {}, len(which))


def _place(site: Site) -> Any:
    return dataclasses.replace(site, r=1, alpha=0.0, scaling=0.0)


def _piece(prefix: str, says: Any, most: int) -> Piece:
    count = 0
    if isinstance(says, dict) and "members" in says:
        return _unlike(prefix, says, most)
    if isinstance(says, dict) and "stack" in says:
        says = dict(says)
        count = says.pop("stack")
        if type(count) is not int or not 0 < count <= LARGEST:
            raise CheckpointError(f"stack: expected how many members, found {short_repr(count)}")
    return Piece(prefix, from_json(says, most=most), {}, count)
