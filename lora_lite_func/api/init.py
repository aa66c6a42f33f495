"""init makes an adapter from a config and a model; targets tells which sites it would have."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..algebra.tree import check_named
from ..core import random
from ..core.adapter import Adapter
from ..core.config import AdapterConfig
from ..core.errors import (
    ConfigError,
    LoraLiteError,
    StructureError,
    UnsupportedError,
    short_repr,
)
from ..core.layout import Layout
from ..core.leaf_dtype import leaf_dtype
from ..core.method import ParamSpec, Variant
from ..core.registry import variant_for
from ..core.shared import group_path
from ..core.site import Site
from ..core.statistics import SiteStatistics
from ..interop.fresh_heads import warn_of_fresh_heads
from ..layers.kinds import KINDS, module_and_name
from ..layers.targeting import find
from ..layers.weights import compute_dtype, device_of
from .calibrate import gather
from .sources import Sources

__all__ = ["init", "targets"]


def init(
    model: nn.Module,
    cfg: AdapterConfig,
    *,
    seed: int = 0,
    calibration_data: Any = None,
    loss_fn: Any = None,
    reference: nn.Module | None = None,
) -> Adapter:
    """A new adapter for a model: `params = ll.init(model, ll.LoRAConfig(r=8))`.

    Pure: the model, its random state and torch's global one are untouched. A tensor's draw depends
    on (seed, path, name) alone, so choosing other sites never changes it.

    Where a head of a model of transformers wasn't in its checkpoint, and the adapter leaves it
    frozen, a warning says how to train it.

    Args:
        model: the frozen base.
        cfg: method, rank, targets.
        seed: of the random starts.
        calibration_data: batches as `ll.calibrate` takes them, or what it returned, for methods
            whose start depends on data.
        loss_fn: (output, batch) -> scalar loss, for methods whose start depends on gradients.
        reference: the model before quantisation, for methods that start at what quantising has lost
            (LoftQ): its weights of the same paths are read.

    Raises:
        TargetError: a pattern, role or layer index selects nothing.
        UnsupportedError: the method can't adapt a chosen layer; with path, reason and way out.
        ConfigError: calibration data or a reference missing, not enough, or for a method that takes
            none, or a seed that is no int.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"seed: expected int, found {short_repr(seed)}")
    variant = variant_for(type(cfg))
    found = find(model, variant, cfg)
    seen = gather(model, variant, cfg, found, calibration_data, loss_fn)
    if variant.plan is not None:
        planned = variant.plan(cfg, [site for site, _ in found], seen)
        if planned is not cfg:
            cfg, found = planned, find(model, variant, planned)
    data: dict[str, dict[str, Tensor]] = {}
    copies: dict[Any, tuple[weakref.ref[Tensor], Tensor]] = {}
    shared: dict[tuple[str, str], Tensor] = {}
    homes = [_Home(*_home(site, module), copies, shared) for site, module in found]
    with _unsurrounded({home.device.type for home in homes}):
        sources = Sources(variant, cfg, found, seen, reference)
        for (site, module), home in zip(found, homes, strict=True):
            try:
                data[site.path] = _start(variant, cfg, site, home, module, seed, sources)
            except LoraLiteError as error:
                raise type(error)(f"site {site.path!r}: {error}") from None
    made = Adapter(Layout(variant, cfg, (site for site, _ in found)), data)
    warn_of_fresh_heads(model, made.sites.values())
    return made


def targets(model: nn.Module, cfg: AdapterConfig) -> tuple[Site, ...]:
    """What `init` would adapt, in model order.

    Raises:
        TargetError: a pattern, role or layer index selects nothing.
        UnsupportedError: the method can't adapt a chosen layer.
    """
    return tuple(site for site, _ in find(model, variant_for(type(cfg)), cfg))


@contextmanager
def _unsurrounded(kinds: set[str]) -> Iterator[None]:
    """Make starts independent of a caller's autocast or `with torch.device(...)`."""
    with ExitStack() as stack:
        # The device is set only where it has to be, because it slows every call of torch.
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in sorted(kinds | {"cpu"}):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class _Home(NamedTuple):
    """Where a site's tensors go, and what was made so far that it may share.

    Attributes:
        device: where it computes.
        dtype: in which dtype.
        copies: of frozen starts, {what was copied to where: (the original, its copy)}.
        shared: {(group, lora_name): the tensor that the sites of the group have in common}.
    """

    device: torch.device
    dtype: torch.dtype
    copies: dict[Any, tuple[weakref.ref[Tensor], Tensor]]
    shared: dict[tuple[str, str], Tensor]

    def copy(self, value: Tensor, dtype: torch.dtype, frozen: bool) -> Tensor:
        """A clone of a start, because trainable tensors must not share storage.

        Sites that share one frozen start share one clone.
        """
        key = (id(value), self.device, dtype)
        if frozen and key in self.copies and self.copies[key][0]() is value:
            return self.copies[key][1]
        made = value.detach().to(
            self.device, dtype, copy=True, memory_format=torch.contiguous_format
        )
        if frozen:
            self.copies[key] = weakref.ref(value), made
        return made


_MOST_NUMBERS = 2**34
"""More of them at one site are a mistake, of which the system would stop the program."""


def _start(
    variant: Variant,
    cfg: AdapterConfig,
    site: Site,
    home: _Home,
    module: Any,
    seed: int,
    sources: Sources,
) -> dict[str, Tensor]:
    """The first tensors of a site, on the device of its weight.

    A stack of weights has one start per weight, with draws of its own.
    """
    specs = _specs(variant, cfg, site)
    count = max(site.num_experts, 1) * sum(math.prod(spec.shape) for spec in specs.values())
    if count > _MOST_NUMBERS:
        shapes = ", ".join(f"{name} {tuple(spec.shape)}" for name, spec in specs.items())
        raise ConfigError(f"{variant.name} asks for {count:.2g} numbers, {shapes}; lower its sizes")
    W, reference = sources.weight(site, module), sources.referred(site)
    starts = []
    for i in range(max(site.num_experts, 1)):
        draw = functools.partial(_generator, seed, site, i, specs)
        weight, referred = (_of_member(t, site, i) for t in (W, reference))
        told = sources.stats(site, referred)
        starts.append(_one_start(variant, cfg, site, specs, weight, told, draw, home))
    if not site.num_experts:
        return starts[0]
    return {
        name: torch.stack([s[name] for s in starts]) if spec.group is None else starts[0][name]
        for name, spec in specs.items()
    }


def _of_member(t: Any, site: Site, i: int) -> Any:
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


def _home(site: Site, module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a site computes, and in which dtype.

    For a whole module its first floating parameter tells it.
    """
    if not KINDS[site.kind].whole:
        name = module_and_name(site)[1]
        return device_of(module, name), compute_dtype(module, name)
    first = next(
        (p for p in module.parameters() if p.is_floating_point() and p.itemsize > 1),
        torch.empty(0, device="cpu"),
    )
    return first.device, first.dtype


def _one_start(
    variant: Variant,
    cfg: AdapterConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Any,
    seen: SiteStatistics | None,
    draw: Callable[[str], torch.Generator],
    home: _Home,
) -> dict[str, Tensor]:
    given: Mapping[str, Tensor] = {}
    if variant.init is not None:
        given = check_named(
            variant.init(cfg, site, specs, weight, seen, draw),
            specs,
            f"{variant.name}.init",
            "its param_specs have",
        )
    start = {}
    for name, spec in specs.items():
        if spec.group is not None and (spec.group, name) in home.shared:
            start[name] = _of_group(home, spec.group, name)
            continue
        dtype = leaf_dtype(spec, cfg.dtype or home.dtype)
        value = given[name] if name in given else _drawn(spec, draw, name, home.device, dtype)
        if tuple(value.shape) != tuple(spec.shape):
            raise StructureError(
                f"{variant.name}.init gave {name} the shape {tuple(value.shape)}, expected "
                f"{tuple(spec.shape)}"
            )
        if name in given:
            start[name] = home.copy(value, dtype, not spec.trainable)
        else:
            start[name] = value.detach().to(
                home.device, dtype, memory_format=torch.contiguous_format
            )
        if spec.group is not None:
            home.shared[spec.group, name] = start[name]
    return start


def _of_group(home: _Home, group: str, name: str) -> Tensor:
    """The tensor that a site shares with others that have started.

    Raises:
        UnsupportedError: they are on another device.
    """
    common = home.shared[group, name]
    if common.device != home.device:
        raise UnsupportedError(
            f"it shares {name} with layers on {common.device} and is itself on {home.device}: one "
            f"tensor can't be on both; put the model on one device, or adapt the layers of each "
            f"device by an adapter of their own"
        )
    return common


def _specs(variant: Variant, cfg: AdapterConfig, site: Site) -> Mapping[str, ParamSpec]:
    specs = variant.param_specs(cfg, site)
    if not isinstance(specs, Mapping) or not all(isinstance(s, ParamSpec) for s in specs.values()):
        raise ConfigError(
            f"{variant.name}.param_specs: expected a mapping of names to ParamSpecs, found "
            f"{short_repr(specs)}"
        )
    if not specs:
        raise ConfigError(f"{variant.name}.param_specs: expected at least one tensor, found {{}}")
    if all(spec.group is not None for spec in specs.values()):
        raise ConfigError(
            f"{variant.name}.param_specs: expected at least one tensor of the site's own, found "
            f"{short_repr(sorted(specs))}"
        )
    for name, spec in specs.items():
        if not isinstance(name, str) or not name.startswith("lora_") or "." in name:
            raise ConfigError(
                f"{variant.name} names a tensor {name!r}; expected a name that begins with "
                f"'lora_', without dots"
            )
        if spec.init not in ("zeros", "ones", "kaiming") and not callable(spec.init):
            raise ConfigError(
                f"{variant.name}: {name} starts as {spec.init!r}; expected 'zeros', 'ones', "
                f"'kaiming' or a draw"
            )
        _check_spec(spec, f"{variant.name}: {name}")
    return specs


def _check_spec(spec: ParamSpec, where: str) -> None:
    shape, dtype, axis = spec.shape, spec.dtype, spec.rank_axis
    if not isinstance(shape, (tuple, list)) or not all(
        isinstance(n, int) and n >= 0 for n in shape
    ):
        raise ConfigError(f"{where} has the shape {short_repr(shape)}; expected a tuple of sizes")
    if axis is not None and not 0 <= axis < len(shape):
        raise ConfigError(
            f"{where} has rank_axis={axis}; expected one of its {len(shape)} axes, counted from 0"
        )
    if spec.group is not None and (not isinstance(spec.group, str) or not spec.group):
        raise ConfigError(
            f"{where} has the group {short_repr(spec.group)}; expected a name, or None for a "
            f"tensor of the site's own"
        )
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{where} is {short_repr(dtype)}; expected a torch.dtype or None")
    if dtype.is_complex:
        raise ConfigError(
            f"{where} is {dtype}; expected a real dtype (a complex tensor is two, or one with a "
            f"last axis of 2)"
        )
    if spec.trainable and not dtype.is_floating_point:
        raise ConfigError(
            f"{where} is {dtype} and trainable; expected a floating dtype, or trainable=False"
        )


def _drawn(
    spec: ParamSpec,
    draw: Callable[[str], torch.Generator],
    name: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    if spec.init == "zeros":
        return torch.zeros(spec.shape, dtype=dtype, device=device)
    if spec.init == "ones":
        return torch.ones(spec.shape, dtype=dtype, device=device)
    start = random.kaiming if spec.init == "kaiming" else spec.init
    value = start(spec.shape, draw(name))
    if not isinstance(value, Tensor):
        raise ConfigError(f"the draw of {name} gave {short_repr(value)}, expected a tensor")
    return value
