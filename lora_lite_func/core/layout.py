"""Layout: an adapter's static data, and its description as JSON types.

Files and exported programs carry that description.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import AdapterConfig, feature_dropout, from_dict, to_dict
from .config_values import LARGEST
from .errors import CheckpointError, ConfigError, LoraLiteError, nearest, short_repr
from .method import Variant, site_for
from .registry import variant_named, variants
from .shared import group_path, is_group
from .site import Site

__all__ = ["Layout", "LeafSpec", "from_json", "to_json"]

_FORMAT = 1
_FIELDS = ("format", "variant", "config", "sites")

_COLUMNS = (
    "path",
    "kind",
    "d_in",
    "d_out",
    "bias",
    "r",
    "alpha",
    "stack",
    "transposed",
    "plus_one",
)
_TYPES = [str, str, int, int, bool, int, float, int, bool, bool]


class LeafSpec(NamedTuple):
    """What is known of one leaf of an adapter, without its values.

    Attributes:
        shape: the shape of one adapter's leaf; a stack's has a leading axis of members.
        trainable: whether it is learned.
        dtype: None where any floating dtype of 16 bits or more will do. A floating dtype is the
            narrowest that the leaf may have, an integer dtype is the one that it has.
        rank_axis: the axis of `shape` that counts directions, if one does.
    """

    shape: tuple[int, ...]
    trainable: bool
    dtype: torch.dtype | None
    rank_axis: int | None


class Layout:
    """An adapter's static data: its method, its config, its sites and what is known of each leaf.

    Adapters of equal layouts stack.

    Attributes:
        variant: the method.
        config: its config.
        dropout: the probability by which entries of a branch's input are dropped in training.
        sites: {path: Site}, paths in order.
        specs: {path: {lora_name: LeafSpec}}, names in order: of each site, with what it shares with
            others, and of each group that shares something (see shared.py).
        names: {path: the names of the leaves that live there}, sites and then groups.
        shared: {path of a site: {lora_name: path of the group}}, of sites that share something.
    """

    __slots__ = ("config", "dropout", "names", "shared", "sites", "specs", "variant")

    def __init__(self, variant: Variant, config: AdapterConfig, sites: Iterable[Site]) -> None:
        self.variant = variant
        self.config = config
        self.dropout = feature_dropout(config)
        self.sites = {site.path: site for site in sorted(sites, key=lambda s: s.path)}
        self.shared: dict[str, dict[str, str]] = {}
        self.specs = {path: self._leaf_specs(site) for path, site in self.sites.items()}
        self.names = {path: tuple(specs) for path, specs in self.specs.items()}
        if self.shared:
            self._add_groups()

    def _leaf_specs(self, site: Site) -> dict[str, LeafSpec]:
        """A site's leaves. In a stack of experts' weights, each has a leading axis of experts,
        except for what is shared.
        """
        experts = (site.num_experts,) if site.num_experts else ()
        found = {}
        for name, spec in sorted(self.variant.param_specs(self.config, site).items()):
            own = experts if spec.group is None else ()
            axis = None if spec.rank_axis is None else spec.rank_axis + len(own)
            found[name] = LeafSpec((*own, *spec.shape), spec.trainable, spec.dtype, axis)
            if spec.group is not None:
                self.shared.setdefault(site.path, {})[name] = group_path(spec.group)
        return found

    def _add_groups(self) -> None:
        """Give each group's leaves a place of their own.

        Raises:
            ConfigError: a leaf has other sizes at one site of a group than at another, or a site
                has a path that is a group's.
        """
        odd = next((path for path in self.sites if is_group(path)), None)
        if odd is not None:
            raise ConfigError(f"{odd!r} is no path of a module: it begins with a dot, as a group's")
        first: dict[tuple[str, str], str] = {}
        groups: dict[str, dict[str, LeafSpec]] = {}
        for path, shared in self.shared.items():
            self.names[path] = tuple(name for name in self.specs[path] if name not in shared)
            for name, group in shared.items():
                spec, known = self.specs[path][name], first.setdefault((group, name), path)
                common = groups.setdefault(group, {}).setdefault(name, spec)
                if common != spec:
                    raise ConfigError(
                        f"{self.variant.name}: {known!r} and {path!r} share one {name}, but it is "
                        f"{common.shape} at the first and {spec.shape} at the second; give them "
                        f"one rank, or leave one out"
                    )
        for group, specs in sorted(groups.items()):
            self.specs[group] = dict(sorted(specs.items()))
            self.names[group] = tuple(self.specs[group])

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Layout)
            and self.config == other.config
            and self.sites == other.sites
            and self.names == other.names
            and self.shared == other.shared
        )

    def __hash__(self) -> int:
        return hash((self.config, tuple(self.sites.values())))

    def member(self, index: int) -> Layout:
        """The layout of a stack's member."""
        return self

    def lacking(self, path: str) -> frozenset[int]:
        """The members of a stack that have no such site."""
        return frozenset()

    def __repr__(self) -> str:
        return f"Layout({self.variant.name}, {len(self.sites)} sites, {self.config})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Layout, (self.variant, self.config, tuple(self.sites.values()))


def to_json(layout: Layout) -> dict[str, Any]:
    """The layout as JSON types: format version, method, config with every field, a row per site."""
    sites = [[getattr(site, column) for column in _COLUMNS] for site in layout.sites.values()]
    return {
        "format": _FORMAT,
        "variant": layout.variant.name,
        "config": to_dict(layout.config),
        "sites": sites,
    }


def from_json(says: Any, *, most: int = LARGEST) -> Layout:
    """The layout back from its description, of which nothing is trusted: no pattern in it is run.

    Args:
        says: what `to_json` gave.
        most: the largest number of sites there can be, which is the number of tensors.

    Raises:
        CheckpointError: another format version, an unknown method, a config or site with missing,
            unknown or wrongly typed fields.
    """
    if not isinstance(says, dict):
        raise CheckpointError(f"its metadata: expected an object, found {type(says).__name__}")
    version = says.get("format")
    if type(version) is not int or version != _FORMAT:
        raise CheckpointError(
            f"expected format version {_FORMAT}, found {short_repr(version)}; a newer release "
            f"may read it"
        )
    odd = says.keys() ^ set(_FIELDS)
    if odd:
        raise CheckpointError(
            f"its metadata should have {', '.join(_FIELDS)}; odd: "
            f"{', '.join(map(short_repr, sorted(odd)[:3]))}"
        )
    name = says["variant"]
    variant = variant_named(name) if isinstance(name, str) else None
    if variant is None:
        raise CheckpointError(
            f"unknown variant {short_repr(name)}; {nearest(str(name), variants(), first=50)} "
            f"ll.register adds one"
        )
    try:
        cfg = from_dict(variant.config, says["config"])
    except ConfigError as error:
        raise CheckpointError(f"config: {error}") from None
    try:
        return Layout(variant, cfg, _sites(variant, cfg, says["sites"], most))
    except CheckpointError:
        raise
    except (LoraLiteError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"sites: {error}") from None


def _sites(variant: Variant, cfg: AdapterConfig, rows: Any, most: int) -> list[Site]:
    scale_tensors: dict[float, Tensor] = {}
    sites: dict[str, Site] = {}
    ranks = {cfg.r, *(r for _, r in cfg.rank_pattern)}
    alphas = {cfg.alpha, *(a for _, a in cfg.alpha_pattern)}
    if not isinstance(rows, list) or not rows:
        raise CheckpointError(f"expected a list of sites, found {short_repr(rows)}")
    if len(rows) > most:
        raise CheckpointError(
            f"it lists {len(rows)} sites, but holds {most} tensors; every site has at least one"
        )
    for row in rows:
        if not _is_site(row):
            raise CheckpointError(
                f"a site should be [{', '.join(_COLUMNS)}], found {short_repr(row)}"
            )
        fields = dict(zip(_COLUMNS, row, strict=True))
        site = Site(num_experts=fields.pop("stack"), **fields)
        path, kind, r, alpha = site.path, site.kind, site.r, site.alpha
        if path in sites:
            raise CheckpointError(f"site {short_repr(path)} is listed twice")
        if kind not in variant.sites:
            raise CheckpointError(
                f"site {short_repr(path)}: {variant.name} can't adapt a {short_repr(kind)}"
            )
        if site.num_experts and kind != "parameter":
            raise CheckpointError(
                f"site {short_repr(path)}: a {kind} place is no stack, found one of "
                f"{site.num_experts}"
            )
        if site.plus_one and site.d_in != 1:
            raise CheckpointError(
                f"site {short_repr(path)}: 1 + a weight is a norm's gain alone, found a "
                f"{kind} place"
            )
        if r not in ranks or alpha not in alphas:
            raise CheckpointError(
                f"site {short_repr(path)}: r={r}, alpha={alpha} isn't what its config can give"
            )
        sites[path] = site_for(variant, cfg, site, scale_tensors)
    return list(sites.values())


def _is_site(row: Any) -> bool:
    return (
        isinstance(row, list)
        and [type(v) for v in row] == _TYPES
        and all(0 < size <= LARGEST for size in (row[2], row[3], row[5]))
        and 0 <= row[7] <= LARGEST
        and math.isfinite(row[6])
    )
