"""init: a config and a frozen model give an adapter; targets: which sites that would be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import rng
from .adapter import Adapter, Layout
from .config import AdapterConfig
from .errors import ConfigError, LoraLiteError, StructureError
from .layers import compute_dtype, dense_weight, device_of
from .spec import ParamSpec, Site, Variant, leaf_dtype, lookup
from .targets import find

__all__ = ["init", "targets"]


def init(model: nn.Module, cfg: AdapterConfig, *, seed: int = 0, calibration_data: Any = None, loss_fn: Any = None) -> Adapter:
    """A new adapter for a model: `params = ll.init(model, ll.LoRAConfig(r=8))`.

    Pure: the model, its random state and torch's global one are untouched. A tensor's draw depends on (seed, path, name) alone, so
    choosing other sites never changes it.

    Args:
        model: the frozen base.
        cfg: method, rank, targets.
        seed: of the random starts.
        calibration_data: batches, for methods whose start depends on data.
        loss_fn: (output, batch) -> loss, for methods whose start depends on gradients.

    Raises:
        TargetError: a pattern, role or layer index selects nothing.
        UnsupportedError: the method can't adapt a chosen layer; with path, reason and way out.
        ConfigError: calibration data for a method that takes none.
    """
    variant = lookup(type(cfg))
    if calibration_data is not None or loss_fn is not None:
        raise ConfigError(f"{variant.name} takes no calibration data: its start depends on the weights and the seed alone")
    found = find(model, variant, cfg)
    data: dict[str, dict[str, Tensor]] = {}
    for site, module in found:
        try:
            data[site.path] = _start(variant, cfg, site, module, seed)
        except LoraLiteError as error:
            raise type(error)(f"site {site.path!r}: {error}") from None
    return Adapter(Layout(variant, cfg, (site for site, _ in found)), data)


def targets(model: nn.Module, cfg: AdapterConfig) -> tuple[Site, ...]:
    """What `init` would adapt, in model order.

    Raises:
        TargetError: a pattern, role or layer index selects nothing.
        UnsupportedError: the method can't adapt a chosen layer.
    """
    return tuple(site for site, _ in find(model, lookup(type(cfg)), cfg))


def _start(variant: Variant, cfg: AdapterConfig, site: Site, module: Any, seed: int) -> dict[str, Tensor]:
    """The first tensors of a site, on the device of its weight."""
    specs = variant.param_specs(cfg, site)
    dtype = cfg.dtype or compute_dtype(module)
    device = device_of(module)
    given: Mapping[str, Tensor] = {}
    if variant.init is not None:
        weight = dense_weight(module, variant.name) if "weight" in variant.needs else None
        given = variant.init(cfg, site, specs, weight, None, lambda name: rng.generator(seed, site.path, name))
    start = {}
    for name, spec in specs.items():
        if not name.startswith("lora_") or "." in name:
            raise ConfigError(f"{variant.name} names a tensor {name!r}; expected a name that begins with 'lora_', without dots")
        value = given[name] if name in given else _drawn(spec, seed, site.path, name, device, leaf_dtype(spec, dtype))
        if tuple(value.shape) != tuple(spec.shape):
            raise StructureError(f"{variant.name}.init gave {name} the shape {tuple(value.shape)}, expected {tuple(spec.shape)}")
        # a clone of its own: frozen starts and trainable tensors must not share storage
        start[name] = value.detach().to(device, leaf_dtype(spec, dtype), copy=name in given, memory_format=torch.contiguous_format)
    return start


def _drawn(spec: ParamSpec, seed: int, path: str, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    if spec.init == "zeros":
        return torch.zeros(spec.shape, dtype=dtype, device=device)
    if spec.init == "ones":
        return torch.ones(spec.shape, dtype=dtype, device=device)
    return spec.init(spec.shape, rng.generator(seed, path, name))
