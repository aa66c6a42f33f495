"""Shared leaves: tensors that all sites of a group have in common, such as VB-LoRA's bank.

A method says so by `ParamSpec(group=...)`. The leaf lives once, in the layout and in the adapter,
under a path of the group's own: a dot and the group's name, which no module can have for a path.
So whatever walks an adapter's leaves (the pytree, partition, casts, counts, optimizers, `ravel`,
files, stacks) meets it once and needn't know of it. A transform sees one input, whose gradient is
the sum over the sites; a stack gives it one axis of members.

What works site by site asks for `site_tensors`, where each site has the group's tensors besides its
own, and `regrouped` is the way back.

The other way would be the same tensor object at every site, found again by its identity: but
transforms, `tree_map` and files give back new objects, so that would have to be mended after each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from .site import Site
from .torch_internals import is_tracing_here, is_transformed

__all__ = [
    "Once",
    "each_site",
    "expert_axes",
    "group_path",
    "is_group",
    "kind_of_layer",
    "regrouped",
    "site_tensors",
]

T = TypeVar("T")

Data = Mapping[str, Mapping[str, Any]]
"""{path: {lora_name: leaf}}."""

Groups = Mapping[str, Mapping[str, str]]
"""{path of a site: {lora_name: path of the group that shares it}}, of sites that share something.
"""

_FIRST = "."
"""What the paths of groups begin with, and no module's does."""


def group_path(group: str) -> str:
    """The path under which a group's leaves live."""
    return f"{_FIRST}{group}"


def is_group(path: str) -> bool:
    """Whether a path is a group's, and not a site's."""
    return path[:1] == _FIRST


def kind_of_layer(site: Site) -> str:
    """A group of layers that do the same in a row: those of one size whose paths differ in numbers
    alone.
    """
    names = [name for name in site.path.split(".") if not name.isdecimal()]
    return f"{'.'.join(names)} {site.d_out}x{site.d_in}"


def site_tensors(shared: Groups, data: Data, path: str) -> Mapping[str, Any]:
    """All leaves of a site, {lora_name: leaf}: its own, and those of its groups."""
    groups = shared.get(path)
    if groups is None:
        return data[path]
    return {**data[path], **{name: data[group][name] for name, group in groups.items()}}


def each_site(shared: Groups, data: Data) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(path, all leaves of the site) of each site."""
    if not shared:
        return data.items()
    return [(path, site_tensors(shared, data, path)) for path in data if not is_group(path)]


def regrouped(shared: Groups, data: Data) -> Data:
    """Leaves where they live, of leaves that may be given at the sites as `site_tensors` has them.

    A shared leaf that is given at several sites is taken from the first. What doesn't fit stays as
    it is.
    """
    if not shared:
        return data
    placed: dict[str, dict[str, Any]] = {path: dict(leaves) for path, leaves in data.items()}
    for path, groups in shared.items():
        for name, group in groups.items():
            if name in placed.get(path, ()):
                placed.setdefault(group, {}).setdefault(name, placed[path].pop(name))
    return placed


def expert_axes(p: Mapping[str, Any], shared: Collection[str]) -> dict[str, int | None]:
    """{lora_name: the axis of experts} of a stack's tensors at a site, for vmap's in_dims: None for
    what the experts share.
    """
    return {name: None if name in shared else 0 for name in p}


class Once:
    """A function of tensors that is computed once for tensors that share memory.

    Frozen leaves may be one tensor in fact, though each site has its own (VeRA's projections): a
    cast, a move or a stack of them keeps that.
    """

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Any, Any]] = {}

    def of_object(self, old: Any, new: T) -> T:
        """`new`, or what stood for the same object before."""
        found: T = self._made.setdefault(id(old), (old, new))[1]
        return found

    def __call__(self, make: Callable[..., T], *tensors: Any, key: Any = None) -> T:
        """make(*tensors), or what it gave for the same memory and the same key before."""
        memory = tuple(map(_memory, tensors))
        if None in memory:
            return make(*tensors)
        key = memory, key
        if key not in self._made:
            # The tensors are kept too, so that nothing else gets their memory meanwhile.
            self._made[key] = tensors, make(*tensors)
        made: T = self._made[key][1]
        return made


def _memory(t: Any) -> tuple[Any, ...] | None:
    """What tensors have in common that are one in fact; None where that can't be told."""
    if is_tracing_here() or is_transformed():
        return None
    if type(t) is not Tensor or t.layout is not torch.strided or t.requires_grad:
        return None
    if t.is_meta or not t.numel():
        return None
    return t.data_ptr(), t.dtype, t.shape, t.stride(), t.device
