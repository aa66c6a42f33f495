"""init makes an adapter from a config and a model; targets tells which sites it would have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import AdapterConfig
from ..core.errors import ConfigError, LoraLiteError, short_repr
from ..core.layout import Layout
from ..core.registry import variant_for
from ..core.site import Site
from ..interop.fresh_heads import warn_of_fresh_heads
from ..layers.targeting import find
from .calibrate import gather
from .site_start import Common, placement_of, start_site
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
    common = Common()
    placements = [placement_of(site, module, common) for site, module in found]
    with _outside_autocast_and_device({placement.device.type for placement in placements}):
        sources = Sources(variant, cfg, found, seen, reference)
        for (site, module), placement in zip(found, placements, strict=True):
            try:
                data[site.path] = start_site(variant, cfg, site, placement, module, seed, sources)
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
def _outside_autocast_and_device(kinds: set[str]) -> Iterator[None]:
    """Make starts independent of a caller's autocast or `with torch.device(...)`."""
    with ExitStack() as stack:
        # The device is set only where it has to be, because it slows every call of torch.
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in sorted(kinds | {"cpu"}):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
