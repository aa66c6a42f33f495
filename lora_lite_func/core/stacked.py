"""Stacked: the static data of a stack whose members differ, and the leaves that tell them apart."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from .layout import Layout, LeafSpec
from .site import Params, Site
from .torch_internals import first_of

__all__ = [
    "LENGTH",
    "OF_MEMBERS",
    "PRESENT",
    "SCALING",
    "Stacked",
    "number_of",
    "unfolded",
    "who_lacks",
]

SCALING = "lora_factor"
"""The frozen leaf () of a site whose scale differs among the members of a stack."""

PRESENT = "lora_present"
"""The frozen leaf () of a site that some members of a stack lack: 1 where a member has it, 0 where
it is the base there.
"""

LENGTH = "lora_length"
"""The frozen leaf () of a whole call for which the members of a stack have unlike numbers of
virtual tokens: how many a member has; 0 where it lacks the site.
"""

OF_MEMBERS = (SCALING, PRESENT, LENGTH)
"""The leaves that are a stack's own, and none of the method's."""


def number_of(name: str, site: Site | None) -> float:
    """What a member has for one of `OF_MEMBERS`, by its own site; None where it lacks the site."""
    if site is None:
        return 0.0
    return {SCALING: site.scaling, PRESENT: 1.0, LENGTH: float(site.r)}[name]


class Stacked(Layout):
    """The static data of a stack whose members differ in rank, strength, sites, name or where they
    came from.

    Sites are those that any member has. Leaves are as wide as the widest member's, the others'
    padded with zeros. A site has a leaf `SCALING` where scales differ, a leaf `LENGTH` where
    numbers of virtual tokens do, and a leaf `PRESENT` where some members lack it.

    Attributes:
        members: each member's own layout; one without sites is a free place.
        labels: the members' names, if they have any; None for a free place.
        ranks: the largest rank that each member has anywhere; 0 for a free place.
    """

    __slots__ = ("_lacking", "labels", "members", "ranks")

    def __init__(
        self,
        members: Sequence[Layout],
        labels: Sequence[str | None] | None = None,
        sites: Iterable[Site] = (),
        extra: Mapping[str, Collection[str]] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            members: each member's layout.
            labels: their names.
            sites: further sites that leaves have to be wide enough for.
            extra: {path: which of `OF_MEMBERS` a site has in any case}.
        """
        first = members[0]
        several: dict[str, list[Site]] = {}
        for site in (*sites, *(site for member in members for site in member.sites.values())):
            several.setdefault(site.path, []).append(site)
        widest = [max(own, key=lambda s: s.r) for own in several.values()]
        super().__init__(first.variant, first.config, _levelled(first, widest))
        self.members = tuple(members)
        self.labels = None if labels is None else tuple(labels)
        self.ranks = tuple(max((s.r for s in m.sites.values()), default=0) for m in members)
        groups: dict[tuple[str, ...], list[int]] = {}
        for i, member in enumerate(members):
            groups.setdefault(tuple(member.sites), []).append(i)
        self._lacking = who_lacks(several, groups)
        for path, own in several.items():
            if path in self._lacking or PRESENT in extra.get(path, ()):
                self._add_leaf(path, PRESENT)
            if len({s.scaling for s in own}) > 1 or SCALING in extra.get(path, ()):
                self._add_leaf(path, SCALING)
            unlike = self.variant.virtual is not None and len({s.r for s in own}) > 1
            if unlike or LENGTH in extra.get(path, ()):
                self._add_leaf(path, LENGTH)

    @property
    def extra(self) -> dict[str, tuple[str, ...]]:
        """{path: which of `OF_MEMBERS` it has}."""
        return {
            path: tuple(name for name in names if name in OF_MEMBERS)
            for path, names in self.names.items()
        }

    def around(
        self,
        members: Sequence[Layout],
        labels: Sequence[str | None],
        ranks: Sequence[int],
        lacking: Mapping[str, frozenset[int]],
    ) -> Stacked:
        """The same sites and leaves around other members, which the caller knows to fit."""
        made = object.__new__(Stacked)
        for name in Layout.__slots__:
            setattr(made, name, getattr(self, name))
        made.members, made.labels, made.ranks = tuple(members), tuple(labels), tuple(ranks)
        made._lacking = dict(lacking)
        return made

    def _add_leaf(self, path: str, name: str) -> None:
        own = LeafSpec((), False, torch.float32, None)
        self.specs[path] = dict(sorted({**self.specs[path], name: own}.items()))
        self.names[path] = tuple(sorted((*self.names[path], name)))

    def member(self, index: int) -> Layout:
        """The layout of a member."""
        return self.members[index]

    def lacking(self, path: str) -> frozenset[int]:
        """The members that have no such site."""
        return self._lacking.get(path, frozenset())

    def alone(self) -> Layout | None:
        """The layout of one adapter as wide as the stack, for an average of its members; None where
        they differ in strength or sites, so that it would need a leaf for its own.
        """
        if any(name in OF_MEMBERS for names in self.names.values() for name in names):
            return None
        for member in self.members:
            if member.specs == self.specs:
                return member
        return Layout(self.variant, self.config, self.sites.values())

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, Stacked):
            return self.members == other.members and self.names == other.names
        return isinstance(other, Layout) and all(member == other for member in self.members)

    __hash__ = Layout.__hash__

    def __repr__(self) -> str:
        return f"Stacked({len(self.members)} of {self.variant.name}, {len(self.sites)} sites)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Stacked, (self.members, self.labels, tuple(self.sites.values()), self.extra)


def _levelled(layout: Layout, sites: Sequence[Site]) -> list[Site]:
    """The sites, of which those that share a leaf with an axis of ranks have the largest rank of
    their group.
    """
    groups: dict[str, str] = {}
    for site in sites:
        specs = layout.variant.param_specs(layout.config, site).values()
        group = first_of((s.group for s in specs if s.group and s.rank_axis is not None), None)
        if group is not None:
            groups[site.path] = group
    if not groups:
        return list(sites)
    ranks: dict[str | None, int] = {}
    for site in sites:
        group = groups.get(site.path)
        ranks[group] = max(ranks.get(group, 0), site.r)
    return [
        site.having(r=ranks[groups[site.path]]) if site.path in groups else site for site in sites
    ]


def who_lacks(
    paths: Iterable[str], groups: Mapping[tuple[str, ...], Collection[int]]
) -> dict[str, frozenset[int]]:
    """{path: the members that lack the site}, of those that some do.

    Args:
        paths: the sites.
        groups: {the sites of some members: their numbers}.
    """
    sets: dict[tuple[int, ...], frozenset[int]] = {}  # paths that the same members lack share one
    found = {}
    for path in paths:
        lacking = tuple(n for n, sites in enumerate(groups) if path not in sites)
        if lacking not in sets:
            numbers = list(groups.values())
            sets[lacking] = frozenset(i for n in lacking for i in numbers[n])
        if sets[lacking]:
            found[path] = sets[lacking]
    return found


def unfolded(p: Params, site: Site) -> tuple[Params, Site]:
    """A method's own tensors, and the site with its scale as data, where it is.

    It is among the tensors of a mixed stack's member; under torch.compile any scale is data.
    """
    if SCALING in p:
        site = site.scaled(p[SCALING])
    elif torch.compiler.is_dynamo_compiling() and site.scale_tensor is not None:
        site = site.scaled(site.scale_tensor)
    if SCALING in p or PRESENT in p or LENGTH in p:
        p = {name: t for name, t in p.items() if name not in OF_MEMBERS}
    return p, site
