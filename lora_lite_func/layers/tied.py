"""A bare parameter is one tensor, however many modules hold it: what adapts it adapts it in each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch import nn

from .kinds import KINDS, place
from .ops import Op
from .spec import Site

__all__ = ["everywhere", "home_of", "twins"]


def twins(model: nn.Module, sites: Iterable[Site]) -> dict[str, list[Site]]:
    """{path of a bare parameter that is tied: the same site under the other names of that tensor}; empty where none is."""
    bare = [site for site in sites if KINDS[site.kind].bare]
    if not bare:
        return {}
    names: dict[int, list[str]] = {}
    tensors: dict[str, int] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            full = f"{path}.{name}" if path else name
            names.setdefault(id(p), []).append(full)
            tensors[full] = id(p)
    found = {site.path: [n for n in names.get(tensors.get(site.path, 0), ()) if n != site.path] for site in bare}
    return {site.path: [dataclasses.replace(site, path=name) for name in found[site.path]] for site in bare if found[site.path]}


def everywhere(model: nn.Module, sites: Mapping[str, list[Op]]) -> Mapping[str, list[Op]]:
    """The adapters by path, those of tied bare parameters under each of their names."""
    more = twins(model, (ops[-1].site for ops in sites.values()))
    if not more:
        return sites
    spread = {path: list(ops) for path, ops in sites.items()}
    for path, others in more.items():
        for site in others:
            spread.setdefault(site.path, []).extend(op._replace(site=site) for op in sites[path])
    return spread


def home_of(site: Site) -> str:
    """The path of the module that holds a site's tensors in a bound model."""
    return place(site)[0]
