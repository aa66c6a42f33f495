"""Sets of adapters: several of one method as one pytree whose leaves have a leading axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..core.adapter import Adapter, count_members, member, rebuild
from ..core.adapter_shapes import check_shapes
from ..core.config import to_dict
from ..core.errors import StructureError, nearest
from ..core.layout import Layout
from ..core.shared import Once
from ..core.stacked import Stacked
from ..core.torch_internals import first_of
from .alike import check_adapter
from .members import Common, can_put, piled, put

__all__ = ["concatenate", "names", "num_members", "stack", "unstack", "update"]


def stack(adapters: Iterable[Adapter] | Mapping[str, Adapter]) -> Adapter:
    """K adapters of one method as one, every leaf with a leading axis of K; a dict's names are
    kept.

    Strengths, ranks and sites may differ. Shorter ranks are padded with directions of zeros, where
    that changes nothing. A site that a member lacks is the base for it. Where scales differ, each
    site gets one more frozen leaf, `lora_factor` (K,); where some members lack a site, it gets
    `lora_present` (K,), 1 or 0; otherwise nothing is added.

    Raises:
        StructureError: nothing to stack, or the first difference between two of them: in method,
            settings, sizes of a site, ranks that can't be padded, leaves that are absent, shapes,
            dtypes or devices.
    """
    labels = None
    if isinstance(adapters, Mapping) and not isinstance(adapters, Adapter):
        labels, adapters = _labels(adapters), adapters.values()
    if isinstance(adapters, Adapter) or not isinstance(adapters, Iterable):
        raise StructureError(
            f"stack: expected a sequence of adapters, found {type(adapters).__name__}"
        )
    several = list(adapters)
    if not several:
        raise StructureError("stack: expected at least one adapter, found none")
    common = Common()
    for i, other in enumerate(several):
        check_adapter(other, f"stack: number {i}")
        common.check(other.layout, f"stack: number {i}")
        common.take(other.layout)
    return _stacked(several, labels)


def _stacked(several: Sequence[Adapter], labels: Sequence[str | None] | None) -> Adapter:
    """The stack of adapters that are known to be members of one."""
    layout, once = _layout([a.layout for a in several], labels), Once()
    made = [
        piled(path, name, several, layout, once)
        for path, leaves in layout.names.items()
        for name in leaves
    ]
    return rebuild(layout, made)


def unstack(stacked: Adapter) -> list[Adapter]:
    """The K adapters of a stack, as views, each with its own config, rank and strength.

    Raises:
        StructureError: not a stack.
    """
    return [member(stacked, i) for i in range(count_members(stacked, "unstack"))]


def num_members(stacked: Adapter) -> int:
    """How many adapters a stack has.

    Raises:
        StructureError: not a stack.
    """
    return count_members(stacked, "num_members")


def names(stacked: Adapter) -> tuple[str, ...] | None:
    """The names of a stack's members, in order; None if they have none. A free place of a bank has
    the name "".

    Raises:
        StructureError: not an Adapter.
    """
    check_adapter(stacked, "names")
    labels = _labels_of(stacked)
    return None if labels is None else tuple(label or "" for label in labels)


def update(stacked: Adapter, which: int | str, adapter: Adapter) -> Adapter:
    """The stack with another adapter in one member's place. Pure.

    Args:
        stacked: the stack.
        which: the member's number (negative ones count from the end), or its name.
        adapter: one adapter that stacks with the others; its rank and strength may differ.

    Raises:
        StructureError: no such member, or the adapter doesn't stack with the others.
    """
    count, labels = count_members(stacked, "update"), _labels_of(stacked)
    check_adapter(adapter, "update")
    check_shapes(adapter)
    place = _number(which, count, labels)
    layouts = [stacked.layout.member(i) for i in range(count)]
    common = Common()
    for layout in layouts[:place] + layouts[place + 1 :]:
        common.take(layout)
    common.check(adapter.layout, f"stack: number {place}")
    layouts[place] = adapter.layout
    layout = _layout(layouts, labels)
    if layout.specs == stacked.layout.specs and can_put(adapter, stacked):
        return rebuild(layout, put(adapter, stacked, place))
    several = unstack(stacked)
    several[place] = adapter
    return _stacked(several, labels)


def _number(which: Any, count: int, labels: Sequence[str | None] | None) -> int:
    """A member's number, from 0.

    Raises:
        StructureError: no such member.
    """
    if isinstance(which, str):
        if labels is None or which not in labels:
            known = [label for label in labels or () if label is not None]
            raise StructureError(f"update: no member {which!r}; {nearest(which, known)}")
        return labels.index(which)
    if isinstance(which, bool) or not hasattr(which, "__index__"):
        raise StructureError(
            f"update: expected a member's number or name, found {type(which).__name__}"
        )
    number = int(which.__index__())
    if not -count <= number < count:
        raise StructureError(f"update: expected a member 0 to {count - 1}, found {number}")
    return number % count


def concatenate(stacks: Sequence[Adapter]) -> Adapter:
    """Several stacks as one, members in order; names are kept if all have them.

    Raises:
        StructureError: not stacks, members that don't stack, or a name that comes twice.
    """
    if isinstance(stacks, Mapping) or not isinstance(stacks, Iterable):
        raise StructureError(
            f"concatenate: expected a sequence of stacks, found {type(stacks).__name__}"
        )
    stacks = list(stacks)
    several = [a for s in stacks for a in unstack(s)]
    labels = [_labels_of(s) for s in stacks]
    if not stacks or any(ls is None for ls in labels):
        return stack(several)
    flat = [label for ls in labels for label in ls or () if label is not None]
    several = [a for a in several if a]  # without free places
    twice = next((label for label in flat if flat.count(label) > 1), None)
    if twice is not None:
        raise StructureError(f"concatenate: two members are named {twice!r}")
    return stack(dict(zip(flat, several, strict=True)))


# ------------------------------------------------------------------------------------ static data
def _labels(adapters: Mapping[str, Adapter]) -> list[str]:
    odd = first_of((label for label in adapters if not isinstance(label, str)), None)
    if odd is not None:
        raise StructureError(f"stack: expected names, found {odd!r}")
    return list(adapters)


def _labels_of(stacked: Adapter) -> tuple[str | None, ...] | None:
    return stacked.layout.labels if isinstance(stacked.layout, Stacked) else None


def _layout(layouts: Sequence[Layout], labels: Sequence[str | None] | None) -> Layout:
    """The layout of all members if nothing tells them apart, else one that keeps each of them."""
    first = layouts[0]
    if labels is None and all(other is first or _alike(first, other) for other in layouts):
        return first
    return Stacked(layouts, labels)


def _alike(a: Layout, b: Layout) -> bool:
    return a == b and to_dict(a.config) == to_dict(b.config)
