"""Sets of adapters: several of one method as one pytree whose leaves have a leading axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import ABSENT, Adapter, member, members_of, rebuild
from ..core.config import to_dict
from ..core.errors import StructureError, nearest
from ..core.layout import SCALING, Layout, Stacked
from .alike import check_adapter, check_same_method, check_same_sites, other_settings

__all__ = ["concatenate", "names", "num_members", "stack", "unstack", "update"]

_FREE = frozenset({"r", "alpha"})
"""What members of a stack may differ in: ranks are padded with zeros, strengths become a leaf."""


def stack(adapters: Iterable[Adapter] | Mapping[str, Adapter]) -> Adapter:
    """K adapters of one method on the same sites as one, every leaf with a leading axis of K; a
    dict's names are kept.

    Strengths and ranks may differ. Shorter ranks are padded with directions of zeros, where that
    changes nothing. Where scales differ, each site gets one more frozen leaf, `lora_factor` (K,);
    where they are equal, nothing is added.

    Raises:
        StructureError: nothing to stack, or the first difference between two of them: in method,
            sites, settings, ranks that can't be padded, leaves that are absent, shapes, dtypes or
            devices.
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
    for i, other in enumerate(several):
        check_stackable(several[0], other, f"stack: number {i}")
        _check_ranks(several[0].layout, other.layout, f"stack: number {i}")
    layout = _layout([a.layout for a in several], labels)
    made = [
        _piled(path, name, [_own(a, path, name) for a in several], layout)
        for path, leaves in layout.names.items()
        for name in leaves
    ]
    return rebuild(layout, made)


def unstack(stacked: Adapter) -> list[Adapter]:
    """The K adapters of a stack, as views, each with its own config, rank and strength.

    Raises:
        StructureError: not a stack.
    """
    return [member(stacked, i) for i in range(members_of(stacked, "unstack"))]


def num_members(stacked: Adapter) -> int:
    """How many adapters a stack has.

    Raises:
        StructureError: not a stack.
    """
    return members_of(stacked, "num_members")


def names(stacked: Adapter) -> tuple[str, ...] | None:
    """The names of a stack's members, in order; None if they have none.

    Raises:
        StructureError: not an Adapter.
    """
    check_adapter(stacked, "names")
    return stacked.layout.labels if isinstance(stacked.layout, Stacked) else None


def update(stacked: Adapter, which: int | str, adapter: Adapter) -> Adapter:
    """The stack with another adapter in one member's place. Pure.

    Args:
        stacked: the stack.
        which: the member's number (negative ones count from the end), or its name.
        adapter: one adapter that stacks with the others; its rank and strength may differ.

    Raises:
        StructureError: no such member, or the adapter doesn't stack with the others.
    """
    several, labels = unstack(stacked), names(stacked)
    if isinstance(which, str):
        if labels is None or which not in labels:
            raise StructureError(f"update: no member {which!r}; {nearest(which, labels or ())}")
        which = labels.index(which)
    if isinstance(which, bool) or not hasattr(which, "__index__"):
        raise StructureError(
            f"update: expected a member's number or name, found {type(which).__name__}"
        )
    which = which.__index__()
    if not -len(several) <= which < len(several):
        raise StructureError(f"update: expected a member 0 to {len(several) - 1}, found {which}")
    several[which] = adapter
    return stack(several if labels is None else dict(zip(labels, several, strict=True)))


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
    labels = [names(s) for s in stacks]
    if not stacks or any(ls is None for ls in labels):
        return stack(several)
    flat = [label for ls in labels for label in ls or ()]
    twice = next((label for label in flat if flat.count(label) > 1), None)
    if twice is not None:
        raise StructureError(f"concatenate: two members are named {twice!r}")
    return stack(dict(zip(flat, several, strict=True)))


# -------------------------------------------------------------------------------------- what stacks
def check_stackable(a: Adapter, b: Adapter, what: str) -> None:
    """Refuse an adapter that can't be stacked with the first.

    Raises:
        StructureError: it can't; the message names the first difference.
    """
    check_same_method(a, b, what)
    if a.layout is b.layout:
        return
    if any(isinstance(x.layout, Stacked) for x in (a, b)):
        raise StructureError(f"{what} is a stack itself; ll.concatenate puts stacks together")
    first, second = (
        {
            path: dataclasses.replace(site, r=1, alpha=1.0, scaling=1.0)
            for path, site in x.sites.items()
        }
        for x in (a, b)
    )
    check_same_sites(first, second, what)
    free = {name: getattr(a.config, name) for name in _FREE} | {
        n: getattr(a.config, n) for n in ("rank_pattern", "alpha_pattern")
    }
    other = dataclasses.replace(b.config, **free)
    if other != a.config:
        raise other_settings(a.config, other, what)


def _check_ranks(first: Layout, other: Layout, what: str) -> None:
    """Refuse a member whose tensors can't be padded to the first's, or the first's to them."""
    if other is first:
        return
    for path, names in first.names.items():
        if other.names[path] != names:
            raise StructureError(
                f"{what} has other tensors at {path!r}: {', '.join(other.names[path])}, the "
                f"first {', '.join(names)}"
            )
        for name in names:
            shape, expected = other.specs[path][name].shape, first.specs[path][name].shape
            if not _fits(shape, expected, first.specs[path][name].rank_axis):
                raise StructureError(
                    f"{what} differs at {path!r} {name}: {shape}, the first {expected} (its rank "
                    f"is {first.sites[path].r}); "
                    f"{first.variant.name} has no direction of zeros that changes nothing, so it "
                    f"can't be padded: stack equal ranks"
                )


def _labels(adapters: Mapping[str, Adapter]) -> list[str]:
    odd = next((label for label in adapters if not isinstance(label, str)), None)
    if odd is not None:
        raise StructureError(f"stack: expected names, found {odd!r}")
    return list(adapters)


def _layout(layouts: list[Layout], labels: list[str] | None) -> Layout:
    """The layout of all members if nothing tells them apart, else one that keeps each of them."""
    first = layouts[0]
    if labels is None and all(other is first or _alike(first, other) for other in layouts):
        return first
    return Stacked(layouts, labels)


def _alike(a: Layout, b: Layout) -> bool:
    return a == b and to_dict(a.config) == to_dict(b.config)


# ------------------------------------------------------------------------------------------- leaves
def _own(adapter: Adapter, path: str, name: str) -> Any:
    """A leaf of a member, or its scale, where the stack has a leaf for that."""
    if name != SCALING:
        return adapter._data[path][name]
    like = next(
        (
            t
            for t in adapter._data[path].values()
            if isinstance(t, Tensor) and t.is_floating_point()
        ),
        None,
    )
    if like is None:
        return ABSENT
    return torch.tensor(
        adapter.sites[path].scaling,
        dtype=torch.promote_types(like.dtype, torch.float32),
        device=like.device,
    )


def _piled(path: str, name: str, column: list[Any], layout: Layout) -> Any:
    kinds = [_kind(t) for t in column]
    axis = layout.specs[path][name].rank_axis if isinstance(layout, Stacked) else None
    first = kinds[0]
    for i, kind in enumerate(kinds):
        if kind[1:] != first[1:] or not _fits(kind[0], first[0], axis):
            raise StructureError(
                f"stack: number {i} differs at {path!r} {name}: {', '.join(map(str, kind))}, the "
                f"first {', '.join(map(str, first))}"
            )
    if column[0] is ABSENT:
        return ABSENT
    if axis is not None and any(kind[0] != first[0] for kind in kinds):
        column = [_padded(t, axis, layout.specs[path][name].shape[axis]) for t in column]
    return torch.stack(column)


def _padded(t: Tensor, axis: int, size: int) -> Tensor:
    short = size - t.shape[axis]
    return (
        t
        if short == 0
        else torch.cat(
            [t, t.new_zeros([short if i == axis else n for i, n in enumerate(t.shape)])], axis
        )
    )


def _fits(shape: Any, other: Any, axis: int | None) -> bool:
    if (
        axis is None
        or not isinstance(shape, tuple)
        or not isinstance(other, tuple)
        or len(shape) != len(other)
    ):
        return bool(shape == other)
    return all(a == b or i == axis for i, (a, b) in enumerate(zip(shape, other, strict=True)))


def _kind(leaf: Any) -> tuple[Any, ...]:
    """What leaves must share to be stacked: shape (except for the rank), dtype and device."""
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (leaf,)
