"""The first tensors of one site: drawn, or made by the method's `init`, on the site's device."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.tree import check_named
from ..core import random
from ..core.config import AdapterConfig
from ..core.errors import ConfigError, StructureError, UnsupportedError, short_repr
from ..core.leaf_dtype import leaf_dtype
from ..core.method import ParamSpec, Variant
from ..core.param_spec import check_specs
from ..core.shared import group_path
from ..core.site import Site
from ..core.statistics import SiteStatistics
from ..layers.kinds import KINDS, module_and_name
from ..layers.weights import compute_dtype, device_of
from .sources import Sources

__all__ = ["Common", "Placement", "placement_of", "start_site"]


@dataclass(frozen=True)
class Common:
    """Tensors made so far in one `init` that later sites may share.

    Attributes:
        copies: of frozen starts, {what was copied to where: (the original, its copy)}.
        of_groups: {(group, lora_name): the tensor that the sites of the group have in common}.
    """

    copies: dict[Any, tuple[weakref.ref[Tensor], Tensor]] = field(default_factory=dict)
    of_groups: dict[tuple[str, str], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """Where a site's tensors go.

    Attributes:
        device: where the site computes.
        dtype: in which dtype.
        common: what it may share with other sites.
    """

    device: torch.device
    dtype: torch.dtype
    common: Common

    def copy(self, value: Tensor, dtype: torch.dtype, frozen: bool) -> Tensor:
        """A clone of a start, because trainable tensors must not share storage.

        Sites that share one frozen start share one clone.
        """
        key, copies = (id(value), self.device, dtype), self.common.copies
        if frozen and key in copies and copies[key][0]() is value:
            return copies[key][1]
        made = value.detach().to(
            self.device, dtype, copy=True, memory_format=torch.contiguous_format
        )
        if frozen:
            copies[key] = weakref.ref(value), made
        return made

    def of_group(self, group: str, name: str) -> Tensor:
        """The tensor that a site shares with others that have started.

        Raises:
            UnsupportedError: they are on another device.
        """
        common = self.common.of_groups[group, name]
        if common.device != self.device:
            raise UnsupportedError(
                f"it shares {name} with layers on {common.device} and is itself on {self.device}: "
                f"one tensor can't be on both; put the model on one device, or adapt the layers of "
                f"each device by an adapter of their own"
            )
        return common


def placement_of(site: Site, module: nn.Module, common: Common) -> Placement:
    """Where a site computes, and in which dtype; a whole module as its first floating parameter."""
    if not KINDS[site.kind].whole:
        name = module_and_name(site)[1]
        return Placement(device_of(module, name), compute_dtype(module, name), common)
    first = next(
        (p for p in module.parameters() if p.is_floating_point() and p.itemsize > 1),
        torch.empty(0, device="cpu"),
    )
    return Placement(first.device, first.dtype, common)


def start_site(
    variant: Variant,
    cfg: AdapterConfig,
    site: Site,
    placement: Placement,
    module: Any,
    seed: int,
    sources: Sources,
) -> dict[str, Tensor]:
    """The first tensors of a site, {lora_name: tensor}.

    A stack of weights has one start per weight, with draws of its own.

    Raises:
        ConfigError: `param_specs` or `init` of the method gave what can't be meant, or sizes beyond
            any memory.
        StructureError: `init` gave a tensor of another shape than the spec's.
        UnsupportedError: a weight can't be read, or a shared tensor is on another device.
    """
    specs = check_specs(variant.param_specs(cfg, site), variant.name)
    _check_count(specs, max(site.num_experts, 1), variant.name)
    W, reference = sources.weight(site, module), sources.referred(site)
    starts = []
    for i in range(max(site.num_experts, 1)):
        draw = functools.partial(_generator, seed, site, i, specs)
        weight, referred = (_of_expert(t, site, i) for t in (W, reference))
        stats = sources.stats(site, referred)
        starts.append(_start(variant, cfg, site, specs, weight, stats, draw, placement))
    if not site.num_experts:
        return starts[0]
    return {
        name: torch.stack([s[name] for s in starts]) if spec.group is None else starts[0][name]
        for name, spec in specs.items()
    }


_MOST_NUMBERS = 2**34
"""More of them at one site are a mistake, of which the system would stop the program."""


def _check_count(specs: Mapping[str, ParamSpec], starts: int, method: str) -> None:
    count = starts * sum(math.prod(spec.shape) for spec in specs.values())
    if count > _MOST_NUMBERS:
        shapes = ", ".join(f"{name} {tuple(spec.shape)}" for name, spec in specs.items())
        raise ConfigError(f"{method} asks for {count:.2g} numbers, {shapes}; lower its sizes")


def _of_expert(t: Any, site: Site, i: int) -> Any:
    """The i-th weight of a stack, or the one that there is."""
    return t[i].contiguous() if t is not None and site.num_experts else t


def _generator(
    seed: int, site: Site, i: int, specs: Mapping[str, ParamSpec], name: str
) -> torch.Generator:
    """What a tensor is drawn with; one that several sites share, by its group alone."""
    group = specs[name].group if name in specs else None
    if group is not None:
        return random.generator(seed, group_path(group), name)
    return random.generator(seed, site.path, f"{name}.{i}" if site.num_experts else name)


def _start(
    variant: Variant,
    cfg: AdapterConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Any,
    stats: SiteStatistics | None,
    draw: Callable[[str], torch.Generator],
    placement: Placement,
) -> dict[str, Tensor]:
    """The tensors of one weight, those that its site shares included."""
    given: Mapping[str, Tensor] = {}
    if variant.init is not None:
        given = check_named(
            variant.init(cfg, site, specs, weight, stats, draw),
            specs,
            f"{variant.name}.init",
            "its param_specs have",
        )
    of_groups, start = placement.common.of_groups, {}
    for name, spec in specs.items():
        if spec.group is not None and (spec.group, name) in of_groups:
            start[name] = placement.of_group(spec.group, name)
            continue
        dtype = leaf_dtype(spec, cfg.dtype or placement.dtype)
        value = given[name] if name in given else _drawn(spec, draw, name, placement.device, dtype)
        if tuple(value.shape) != tuple(spec.shape):
            raise StructureError(
                f"{variant.name}.init gave {name} the shape {tuple(value.shape)}, expected "
                f"{tuple(spec.shape)}"
            )
        if name in given:
            start[name] = placement.copy(value, dtype, not spec.trainable)
        else:
            start[name] = value.detach().to(
                placement.device, dtype, memory_format=torch.contiguous_format
            )
        if spec.group is not None:
            of_groups[spec.group, name] = start[name]
    return start


def _drawn(
    spec: ParamSpec,
    draw: Callable[[str], torch.Generator],
    name: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """A start that the spec itself says. Random ones are drawn on the CPU."""
    if spec.init == "zeros":
        return torch.zeros(spec.shape, dtype=dtype, device=device)
    if spec.init == "ones":
        return torch.ones(spec.shape, dtype=dtype, device=device)
    start = random.kaiming if spec.init == "kaiming" else spec.init
    value = start(spec.shape, draw(name))
    if not isinstance(value, Tensor):
        raise ConfigError(f"the draw of {name} gave {short_repr(value)}, expected a tensor")
    return value
