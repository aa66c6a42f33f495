"""A bare parameter is one tensor, however many modules hold it: it is adapted in each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from ..core.site import Site
from .kinds import KINDS, module_and_name

__all__ = ["embeddings_of", "holder_of", "tied_names"]


def embeddings_of(model: Any, end: Literal["input", "output"]) -> Any:
    """The module that a model of transformers names as its table ("input") or its head ("output"),
    or None: a model of two towers has no one table, and says so by NotImplementedError.
    """
    named = getattr(model, f"get_{end}_embeddings", None)
    try:
        return named() if callable(named) else None
    except NotImplementedError:
        return None


def tied_names(model: nn.Module, sites: Iterable[Site]) -> dict[str, list[Site]]:
    """{path of a bare parameter that is tied: the same site under the other names of that tensor};
    empty where none is.
    """
    bare = [site for site in sites if KINDS[site.kind].bare]
    if not bare:
        return {}
    names: dict[int, list[str]] = {}
    tensors: dict[str, int] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            full = f"{path}.{name}" if path else name
            names.setdefault(id(p), []).append(full)
            tensors[full] = id(p)
    found = {
        site.path: [n for n in names.get(tensors.get(site.path, 0), ()) if n != site.path]
        for site in bare
    }
    return {
        site.path: [dataclasses.replace(site, path=name) for name in found[site.path]]
        for site in bare
        if found[site.path]
    }


def holder_of(site: Site) -> str:
    """The path of the module that holds a site's tensors in a bound model."""
    return module_and_name(site)[0]
