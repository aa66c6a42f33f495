"""calibrate: what a model's layers see on some batches, summed as the batches go through.

The recorder is an adapter whose phases change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import function
from ..core.config import AdapterConfig
from ..core.errors import ConfigError, nearest
from ..core.method import Variant
from ..core.registry import variant_for
from ..core.site import Site
from ..core.statistics import SiteStatistics, Statistics
from ..injection.attachment import Attachment
from ..injection.tree_copy import copy_tree
from ..layers.kinds import matrix, module_and_name
from ..layers.targeting import Found, find
from ..layers.weights import dense_weight
from .pairs import PairRecorder
from .recorder import EvalTensors, Recorder, refuse_weight

__all__ = ["calibrate", "gather"]

_DATA = frozenset({"inputs", "activity", "gradients", "pairs"})


def calibrate(
    model: nn.Module, cfg: AdapterConfig, batches: Iterable[Any], *, loss_fn: Any = None
) -> Statistics:
    """What the sites of a config see while the model runs over some batches; `ll.init(..,
    calibration_data=statistics)` takes it.

    The model runs in eval mode, on a copy: nothing is written on it. Only sums are kept, float32 at
    least. In a batch with an "attention_mask", inputs of masked tokens don't count; in gradients
    the loss says what counts.

    Args:
        model: the frozen base.
        cfg: method and targets; the method says whether inputs or gradients are recorded.
        batches: any iterable of tensors (`model(batch)`), mappings (`model(**batch)`, without
            "labels" if forward hasn't it), or tuples and lists: (input, target) with a loss_fn, of
            which the input goes to the model; without one `model(*batch)`, and of a pair that
            forward can't take as two arguments the first, too. For methods that start from
            contrastive pairs a batch is (positive, negative), row by row counterparts. A generator
            works once.
        loss_fn: (output, batch) -> scalar loss, for methods that need gradients; they are averaged
            over batches.

    Raises:
        ConfigError: the method needs no data, or a loss_fn that isn't there; no batches; batches
            that forward can't take.
        UnsupportedError: a site's weight is used without calling the layer, so there is nothing to
            record.
        TargetError: a pattern, role or layer index selects nothing.
    """
    variant = variant_for(type(cfg))
    needs = _checked_needs(variant, cfg, batches, loss_fn)
    return _recorded(model, cfg, find(model, variant, cfg), needs, batches, loss_fn)


def _recorded(
    model: nn.Module,
    cfg: AdapterConfig,
    found: Found,
    needs: frozenset[str],
    batches: Iterable[Any],
    loss_fn: Any,
) -> Statistics:
    """What the sites see in one pass over the batches."""
    rows = _directions(cfg, found) if "activity" in needs else {}
    recorder = PairRecorder(found) if "pairs" in needs else Recorder(found, needs, rows)
    record = Variant(
        name="calibration",
        config=AdapterConfig,
        param_specs=lambda cfg, site: {},
        outputs=recorder.outputs,
        weight=refuse_weight,
    )
    count = 0
    with torch.inference_mode(False), torch.set_grad_enabled("gradients" in needs):
        copy = copy_tree(
            model,
            {site.path: [Attachment(record, cfg, site, {}, 0.0)] for site, _ in found},
            EvalTensors(),
        )
        for batch in batches:
            count += 1
            recorder.step(copy, batch, loss_fn)
    if count == 0:
        raise ConfigError(
            "calibration data: expected at least one batch, found none (a generator gives its "
            "batches once)"
        )
    return recorder.statistics(count)


def _directions(cfg: AdapterConfig, found: Found) -> dict[str, Tensor]:
    """{path: (k, d_in)}: the directions by whose activity a method chooses."""
    variant, made = variant_for(type(cfg)), {}
    assert variant.directions is not None
    for site, module in found:
        _, name = module_and_name(site)
        weight = matrix(dense_weight(module, variant.name, site.d_in * site.d_out, name), site)
        made[site.path] = variant.directions(cfg, site, weight.detach())
    return made


def gather(
    model: nn.Module, variant: Variant, cfg: AdapterConfig, found: Found, data: Any, loss_fn: Any
) -> Mapping[str, SiteStatistics]:
    """{path: SiteStatistics}: what `init` gives a method for its start.

    Every site is there with what it needs. The dict is empty if the method needs no data.

    Args:
        model: the frozen base.
        variant: the method.
        cfg: its config.
        found: the sites.
        data: batches, or what `calibrate` returned.
        loss_fn: as in `calibrate`.

    Raises:
        ConfigError: data is missing or given to a method that takes none, or no batch or no
            gradient reached a site.
    """
    needs = variant.needs_of(cfg) & _DATA
    if not needs and data is None and loss_fn is None:
        return {}
    if needs and isinstance(data, Statistics):
        seen = data
    else:
        needs = _checked_needs(variant, cfg, data, loss_fn)
        seen = _recorded(model, cfg, found, needs, data, loss_fn)
    for site, _ in found:
        if site.path not in seen:
            raise ConfigError(
                f"site {site.path!r}: the statistics haven't it; {nearest(site.path, seen)}"
            )
        _check_complete(site, seen[site.path], needs)
    return seen


def _checked_needs(
    variant: Variant, cfg: AdapterConfig, batches: Any, loss_fn: Any
) -> frozenset[str]:
    needs = variant.needs_of(cfg) & _DATA
    if not needs:
        raise ConfigError(
            f"{variant.name} takes no calibration data: its start depends on the weights and the "
            f"seed alone"
        )
    if batches is None:
        what = (
            "gradients: give calibration_data and loss_fn"
            if "gradients" in needs
            else "the layers' inputs: give calibration_data"
        )
        of = "pairs (positive, negative)" if "pairs" in needs else "batches"
        raise ConfigError(f"{variant.name} starts from {what} ({of} of what the model takes)")
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"calibration data: expected an iterable of batches, found {type(batches).__name__}; "
            f"one batch goes in a list"
        )
    if loss_fn is not None:
        function(loss_fn, "calibration data: loss_fn")
    if "gradients" in needs and loss_fn is None:
        raise ConfigError(
            f"{variant.name} starts from gradients: give loss_fn, (output, batch) -> scalar"
        )
    return needs


def _check_complete(site: Site, seen: SiteStatistics, needs: frozenset[str]) -> None:
    where = f"site {site.path!r}"
    if seen.calls == 0:
        raise ConfigError(
            f"{where}: no batch of the calibration data reached it; give more batches, or leave "
            f"it out"
        )
    if "inputs" in needs:
        if seen.count == 0:
            raise ConfigError(
                f"{where}: every token of the calibration data was masked or none came; check "
                f"attention_mask"
            )
        if len(seen.mean) != site.d_in:
            raise ConfigError(
                f"{where}: expected statistics of {site.d_in} inputs, found {len(seen.mean)}; "
                f"calibrate on this model"
            )
        if not bool(seen.second.isfinite().all()):
            raise ConfigError(f"{where}: its inputs on the calibration data aren't all finite")
    if "activity" in needs and (seen.active is None or not bool(seen.active.isfinite().all())):
        raise ConfigError(
            f"{where}: expected a finite activity of its directions; calibrate on this model, for "
            f"this method"
        )
    if "pairs" in needs:
        if seen.points is None or seen.points.shape[-1] != site.d_in:
            raise ConfigError(
                f"{where}: expected pairs of {site.d_in} inputs; calibrate on this model, for "
                f"this method"
            )
        if not bool(seen.points.isfinite().all()):
            raise ConfigError(f"{where}: its inputs on the pairs aren't all finite")
    if "gradients" in needs:
        if seen.slope is None or not bool(seen.slope.any()):
            raise ConfigError(
                f"{where}: no gradient of the loss reached it; let the loss depend on it, or "
                f"leave it out"
            )
        if tuple(seen.slope.shape) != (site.d_out, site.d_in):
            raise ConfigError(
                f"{where}: expected a gradient of {site.d_out} x {site.d_in}, found "
                f"{tuple(seen.slope.shape)}"
            )
        if not bool(seen.slope.isfinite().all()):
            raise ConfigError(f"{where}: its gradient on the calibration data isn't finite")
