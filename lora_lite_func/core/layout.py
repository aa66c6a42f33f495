"""Layout: an adapter's static data, and its description as JSON types, which files and exported programs carry."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import LARGEST, AdapterConfig, from_dict, to_dict
from .errors import CheckpointError, ConfigError, LoraLiteError, nearest, shown
from .kinds import KINDS
from .spec import Site, Variant, site_for, variants

__all__ = ["FACTOR", "Layout", "Stacked", "describe", "described"]

_FORMAT = 1
_FIELDS = ("format", "variant", "config", "sites")

FACTOR = "lora_factor"
"""The frozen leaf () of a site whose scale differs among the members of a stack."""
_COLUMNS = ("path", "kind", "d_in", "d_out", "bias", "r", "alpha", "stack", "transposed", "plus_one")
_TYPES = [str, str, int, int, bool, int, float, int, bool, bool]


class Layout:
    """An adapter's static data: its method, config, sites and the names of their tensors. Equal layouts stack."""

    __slots__ = ("config", "expected", "least", "names", "sites", "trainable", "variant")

    def __init__(self, variant: Variant, config: AdapterConfig, sites: Iterable[Site]) -> None:
        self.variant = variant
        self.config = config
        self.sites = {site.path: site for site in sorted(sites, key=lambda s: s.path)}
        specs = {path: dict(sorted(variant.param_specs(config, site).items())) for path, site in self.sites.items()}
        self.names = {path: tuple(specs[path]) for path in specs}
        self.expected = {path: {name: stacked(self.sites[path], s.shape) for name, s in specs[path].items()} for path in specs}
        self.least = {path: {name: s.dtype for name, s in specs[path].items()} for path in specs}
        self.trainable = {path: {name: s.trainable for name, s in specs[path].items()} for path in specs}

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Layout) and self.config == other.config and self.sites == other.sites and self.names == other.names

    def __hash__(self) -> int:
        return hash((self.config, tuple(self.sites.values())))

    def member(self, index: int) -> Layout:
        """The layout of a stack's member."""
        return self

    def __repr__(self) -> str:
        return f"Layout({self.variant.name}, {len(self.sites)} sites, {self.config})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Layout, (self.variant, self.config, tuple(self.sites.values()))


def stacked(site: Site, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor of a spec has at a site: one per stacked weight."""
    return (site.stack, *shape) if site.stack else tuple(shape)


class Stacked(Layout):
    """The static data of a stack whose members differ in rank, strength, name or where they came from.

    Leaves are as wide as the widest member's, the others' padded with zeros; where scales differ each site has a leaf `FACTOR`.

    Attributes:
        members: each member's own layout.
        labels: the members' names, if they have any.
    """

    __slots__ = ("labels", "members")

    def __init__(self, members: Sequence[Layout], labels: Sequence[str] | None = None) -> None:
        first = members[0]
        ways = {path: [m.sites[path] for m in members] for path in first.sites}
        super().__init__(first.variant, first.config, [max(sites, key=lambda s: s.r) for sites in ways.values()])
        self.members = tuple(members)
        self.labels = None if labels is None else tuple(labels)
        for path, sites in ways.items():
            if len({s.factor for s in sites}) > 1:
                self.names[path] = tuple(sorted((*self.names[path], FACTOR)))
                self.expected[path][FACTOR] = ()
                self.least[path][FACTOR] = torch.float32
                self.trainable[path][FACTOR] = False

    def member(self, index: int) -> Layout:
        """The layout of a member."""
        return self.members[index]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, Stacked):
            return self.members == other.members
        return isinstance(other, Layout) and all(member == other for member in self.members)

    __hash__ = Layout.__hash__

    def __repr__(self) -> str:
        return f"Stacked({len(self.members)} of {self.variant.name}, {len(self.sites)} sites)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Stacked, (self.members, self.labels)


def describe(layout: Layout) -> dict[str, Any]:
    """The layout as JSON types: format version, method, config with every field, a row per site."""
    sites = [[getattr(site, column) for column in _COLUMNS] for site in layout.sites.values()]
    return {"format": _FORMAT, "variant": layout.variant.name, "config": to_dict(layout.config), "sites": sites}


def described(says: Any, *, most: int = LARGEST) -> Layout:
    """The layout back from its description, which is hostile until shown otherwise: no pattern in it is run.

    Args:
        says: what `describe` gave.
        most: how many sites there can be at most: as many as there are tensors.

    Raises:
        CheckpointError: another format version, an unknown method, a config or site with missing, unknown or wrongly typed fields.
    """
    if not isinstance(says, dict):
        raise CheckpointError(f"its metadata: expected an object, found {type(says).__name__}")
    version = says.get("format")
    if type(version) is not int or version != _FORMAT:
        raise CheckpointError(f"expected format version {_FORMAT}, found {shown(version)}; a newer release may read it")
    odd = says.keys() ^ set(_FIELDS)
    if odd:
        raise CheckpointError(f"its metadata should have {', '.join(_FIELDS)}; odd: {', '.join(map(shown, sorted(odd)[:3]))}")
    known, name = variants(), says["variant"]
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f"unknown variant {shown(name)}; {nearest(str(name), known, first=50)} ll.register adds one")
    try:
        cfg = from_dict(known[name].config, says["config"])
    except ConfigError as error:
        raise CheckpointError(f"config: {error}") from None
    try:
        return Layout(known[name], cfg, _sites(known[name], cfg, says["sites"], most))
    except CheckpointError:
        raise
    except (LoraLiteError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"sites: {error}") from None


def _sites(variant: Variant, cfg: AdapterConfig, rows: Any, most: int) -> list[Site]:
    twins: dict[float, Tensor] = {}
    sites: dict[str, Site] = {}
    ranks = {cfg.r, *(r for _, r in cfg.rank_pattern)}
    alphas = {cfg.alpha, *(a for _, a in cfg.alpha_pattern)}
    if not isinstance(rows, list) or not rows:
        raise CheckpointError(f"expected a list of sites, found {shown(rows)}")
    if len(rows) > most:
        raise CheckpointError(f"it lists {len(rows)} sites, but holds {most} tensors; every site has at least one")
    for row in rows:
        if not _is_site(row):
            raise CheckpointError(f"a site should be [{', '.join(_COLUMNS)}], found {shown(row)}")
        site = Site(**dict(zip(_COLUMNS, row, strict=True)))
        path, kind, r, alpha = site.path, site.kind, site.r, site.alpha
        if path in sites:
            raise CheckpointError(f"site {shown(path)} is listed twice")
        if kind not in variant.sites:
            raise CheckpointError(f"site {shown(path)}: {variant.name} can't adapt a {shown(kind)}")
        if site.stack and kind != "parameter":
            raise CheckpointError(f"site {shown(path)}: a {KINDS[kind].one} is no stack, found one of {site.stack}")
        if site.plus_one and site.d_in != 1:
            raise CheckpointError(f"site {shown(path)}: 1 + a weight is a norm's gain alone, found a {KINDS[kind].one}")
        if r not in ranks or alpha not in alphas:
            raise CheckpointError(f"site {shown(path)}: r={r}, alpha={alpha} isn't what its config can give")
        sites[path] = site_for(variant, cfg, site, twins)
    return list(sites.values())


def _is_site(row: Any) -> bool:
    return (
        isinstance(row, list)
        and [type(v) for v in row] == _TYPES
        and all(0 < size <= LARGEST for size in (row[2], row[3], row[5]))
        and 0 <= row[7] <= LARGEST
        and math.isfinite(row[6])
    )
