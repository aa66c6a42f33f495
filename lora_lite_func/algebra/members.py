"""What adapters must share to be members of one stack, and their leaves in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.absent import ABSENT
from ..core.adapter import Adapter
from ..core.errors import StructureError
from ..core.layout import Layout, LeafSpec
from ..core.shared import Once
from ..core.site import Site
from ..core.stacked import OF_MEMBERS, Stacked, number_of
from .alike import check_same_sites, other_method, other_settings

__all__ = ["Common", "can_put", "kind_of", "padded", "piled", "put"]

_FREE = ("r", "alpha", "rank_pattern", "alpha_pattern")
"""Settings in which members may differ: ranks are padded with zeros, strengths become a leaf."""


class Common:
    """What the members of a stack have in common, taken from one after another."""

    def __init__(self) -> None:
        self._first: Layout | None = None
        self._last: Layout | None = None
        self._first_with: dict[str, Layout] = {}  # the first member that has a site

    def take(self, layout: Layout) -> None:
        """Take what a member has that those before it hadn't."""
        if layout is not self._last:
            self._first, self._last = self._first or layout, layout
            for path in layout.names:
                self._first_with.setdefault(path, layout)

    def check(self, layout: Layout, what: str) -> None:
        """Refuse a layout that can't be a member's.

        Args:
            layout: the static data of one adapter.
            what: which one it is, for messages.

        Raises:
            StructureError: the message names the first difference.
        """
        if layout is self._last:
            return
        first = self._first or layout
        if layout.variant.name != first.variant.name:
            raise other_method(first, layout, what)
        if isinstance(layout, Stacked):
            raise StructureError(f"{what} is a stack itself; ll.concatenate puts stacks together")
        common = [path for path in layout.names if path in self._first_with]
        for path in common:
            site, other = layout.sites.get(path), self._first_with[path].sites.get(path)
            if site is not None and other is not None and _shape_of(site) != _shape_of(other):
                check_same_sites({path: _anywhere(other)}, {path: _anywhere(site)}, what)
        if layout.config != first.config:
            free = {name: getattr(first.config, name) for name in _FREE}
            settings = dataclasses.replace(layout.config, **free)
            if settings != first.config:
                raise other_settings(first.config, settings, what)
        for path in common:
            if layout.specs[path] != self._first_with[path].specs[path]:
                _check_leaves(self._first_with[path], layout, path, what)
            if layout.shared.get(path) != self._first_with[path].shared.get(path):
                raise StructureError(
                    f"{what} shares other tensors at {path!r} than the first, or with other sites"
                )


def _shape_of(site: Site) -> tuple[Any, ...]:
    """What all members must have in common at a site."""
    return (
        site.kind,
        site.d_in,
        site.d_out,
        site.bias,
        site.num_experts,
        site.transposed,
        site.plus_one,
    )


def _anywhere(site: Site) -> Site:
    """A site without what members may differ in."""
    return site.having(r=1, alpha=1.0, scaling=1.0)


def _check_leaves(first: Layout, other: Layout, path: str, what: str) -> None:
    """Refuse a member whose tensors can't be padded to the first's, or the first's to them."""
    if other.names[path] != first.names[path]:
        raise StructureError(
            f"{what} has other tensors at {path!r}: {', '.join(other.names[path])}, the "
            f"first {', '.join(first.names[path])}"
        )
    for name, spec in first.specs[path].items():
        shape = other.specs[path][name].shape
        if not _fits(shape, spec.shape, spec.rank_axis):
            raise StructureError(
                f"{what} differs at {path!r} {name}: {shape}, the first "
                f"{spec.shape}{_rank(first, path)}; {first.variant.name} has no direction of "
                f"zeros that changes nothing, so it can't be padded: stack equal ranks"
            )


def _rank(layout: Layout, path: str) -> str:
    return f" (its rank is {layout.sites[path].r})" if path in layout.sites else ""


# ------------------------------------------------------------------------------------------- leaves
def piled(path: str, name: str, several: Sequence[Adapter], layout: Layout, once: Once) -> Any:
    """A leaf of a stack, (K, ...), of its members' leaves.

    Args:
        path: the site, or the group of shared leaves.
        name: the leaf.
        several: the members.
        layout: the stack's.
        once: stacks frozen leaves that are one in each member once.

    Raises:
        StructureError: they differ in dtype or device, or some are absent.
    """
    spec = layout.specs[path][name]
    if name in OF_MEMBERS:
        return _numbers([number_of(name, a.sites.get(path)) for a in several], path, several)
    column = [a._data[path][name] if path in a else None for a in several]
    axis = spec.rank_axis if isinstance(layout, Stacked) else None
    _check_kinds(column, f"at {path!r} {name}", axis)
    first = next(leaf for leaf in column if leaf is not None)
    if first is ABSENT:
        return ABSENT
    full = [_filler(spec, first) if t is None else padded(t, spec) for t in column]
    if spec.trainable:
        return torch.stack(full)
    return once(lambda *members: torch.stack(members), *full)


def can_put(adapter: Adapter, stacked: Adapter) -> bool:
    """Whether an adapter's leaves have the dtypes and devices of a stack's."""
    return all(
        kind_of(t)[1:] == kind_of(stacked._data[path][name])[1:]
        for path, tensors in adapter._data.items()
        for name, t in tensors.items()
    )


def put(adapter: Adapter, stacked: Adapter, place: int) -> Iterable[Any]:
    """The leaves of a stack with an adapter's in one member's place."""
    once = Once()

    def with_own(leaf: Tensor, own: Tensor) -> Tensor:
        return torch.select_scatter(leaf, own, 0, place)

    for path, tensors in stacked._data.items():
        for name, leaf in tensors.items():
            spec = stacked.layout.specs[path][name]
            own = _own(adapter, path, name, spec, leaf)
            if own is None:
                yield leaf
            else:
                yield with_own(leaf, own) if spec.trainable else once(with_own, leaf, own)


def _own(adapter: Adapter, path: str, name: str, spec: LeafSpec, leaf: Any) -> Tensor | None:
    """What an adapter has for a leaf of a stack; None where that may stay as it is."""
    if leaf is ABSENT:
        return None
    if name in OF_MEMBERS:
        return leaf.new_tensor(number_of(name, adapter.sites.get(path)))
    if path not in adapter:
        return None
    return padded(adapter._data[path][name], spec)


def _numbers(values: Iterable[float], path: str, several: Sequence[Adapter]) -> Any:
    """(K,) numbers, one for each member; absent in that part of a partition which lacks the site's
    first leaf.
    """
    tensors = next(a._data[path] for a in several if path in a)
    first = next(iter(tensors.values()))
    if not isinstance(first, Tensor):
        return ABSENT
    floating = [
        t.dtype for t in tensors.values() if isinstance(t, Tensor) and t.is_floating_point()
    ]
    dtype = torch.promote_types(floating[0] if floating else torch.float32, torch.float32)
    return torch.tensor(list(values), dtype=dtype, device=first.device)


def _check_kinds(column: Sequence[Any], where: str, axis: int | None) -> None:
    first: Any = None
    for i, leaf in enumerate(column):
        if leaf is None:
            continue
        kind = kind_of(leaf)
        first = first or kind
        if kind[1:] != first[1:] or not _fits(kind[0], first[0], axis):
            raise StructureError(
                f"stack: number {i} differs {where}: {', '.join(map(str, kind))}, the "
                f"first {', '.join(map(str, first))}"
            )


def kind_of(leaf: Any) -> tuple[Any, ...]:
    """What leaves must share to be stacked: shape (except for the rank), dtype and device."""
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (leaf,)


def _filler(spec: LeafSpec, like: Tensor) -> Tensor:
    """What stands where a member lacks a site. `PRESENT` says that nobody is to read it. It must be
    harmless in what is computed and left out: no directions, or what another member has there.
    """
    wide = padded(like, spec)
    return wide if spec.rank_axis is None else torch.zeros_like(wide)


def padded(t: Tensor, spec: LeafSpec) -> Tensor:
    """A member's leaf as wide as the stack's, with zeros for the ranks that it hasn't."""
    axis = spec.rank_axis
    if axis is None or t.ndim != len(spec.shape) or t.shape[axis] == spec.shape[axis]:
        return t
    shape = list(t.shape)
    shape[axis] = spec.shape[axis] - t.shape[axis]
    return torch.cat([t, t.new_zeros(shape)], axis)


def _fits(shape: Any, other: Any, axis: int | None) -> bool:
    """Whether two shapes are equal, except for the axis of ranks."""
    if axis is None or not isinstance(shape, tuple) or not isinstance(other, tuple):
        return bool(shape == other)
    return len(shape) == len(other) and all(
        a == b or i == axis for i, (a, b) in enumerate(zip(shape, other, strict=True))
    )
