"""The tasks of a multitask adapter, as a stack."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter, rebuild
from ..core.adapter_shapes import check_shapes
from ..core.arguments import flag
from ..core.config import AdapterConfig
from ..core.errors import UnsupportedError
from ..core.layout import Layout
from ..core.method import site_for
from ..core.registry import variant_for
from ..core.site import Site
from ..core.torch_internals import at_trace_time
from ..variants import LoRAConfig, MPTConfig, PolyConfig, PromptTuningConfig, mpt, poly
from .alike import check_adapter

__all__ = ["tasks"]


def tasks(params: Adapter, *, sampled: bool = False) -> Adapter:
    """The tasks of a multitask adapter as a stack of plain adapters, one for each: `ll.apply(model,
    ll.rows(ll.tasks(params), task_ids), x)`.

    Those of Poly are LoRAs, those of multitask prompt tuning are prompt tunings. Gradients go
    through it to what the tasks share and to what is each one's own, so a training step calls it on
    what it trains. Pure, but for `sampled`.

    Args:
        params: an adapter of `ll.PolyConfig` or `ll.MPTConfig`.
        sampled: draw Poly's mixtures of skills as its paper's training does, from relaxed Bernoulli
            distributions of temperature 1 around the logits, by torch's own generator; one draw
            for each task and site.

    Raises:
        StructureError: not an Adapter, a stack, or a part of a partition.
        UnsupportedError: another method's, or nothing to sample.
    """
    check_adapter(params, "tasks")
    flag(sampled, "tasks: sampled")
    config = type(params.config)
    if config not in _FORMS:
        raise UnsupportedError(
            f"tasks: {params.layout.variant.name} has no tasks; adapters of ll.PolyConfig and "
            f"ll.MPTConfig have"
        )
    if sampled and config is not PolyConfig:
        raise UnsupportedError(f"tasks: sampled: {params.layout.variant.name} mixes no skills")
    check_shapes(params)
    plain, of_tasks = _FORMS[config]
    made: list[Tensor] = []
    for held in params._data.values():
        made += of_tasks(held, sampled)
    values = tuple(getattr(params.config, name) for name in _FIELDS[plain])
    sites = tuple(tuple(getattr(site, name) for name in _OF_SITES) for site in _sites(params))
    return rebuild(getattr(_Layouts, _known(plain, values, sites)), made)


def _prompts(p: Mapping[str, Tensor], sampled: bool) -> tuple[Tensor, ...]:
    if "lora_decoder" in p:
        return mpt.of_tasks_decoder(p), mpt.of_tasks(p)
    return (mpt.of_tasks(p),)


def _loras(p: Mapping[str, Tensor], sampled: bool) -> tuple[Tensor, ...]:
    logits = p["lora_logits"]
    uniform = torch.rand_like(logits).clamp(1e-6, 1.0 - 1e-6) if sampled else None
    return poly.of_tasks(p, 0.0 if uniform is None else uniform.logit())


_FORMS: dict[type[AdapterConfig], tuple[type[AdapterConfig], Callable[..., tuple[Tensor, ...]]]] = {
    MPTConfig: (PromptTuningConfig, _prompts),
    PolyConfig: (LoRAConfig, _loras),
}
"""{config: (that of each task's adapter, (a site's tensors, whether to sample) -> its leaves)}."""


# ------------------------------------------------------------------------------------ static data
_SHARED = tuple(f.name for f in dataclasses.fields(AdapterConfig))
_FIELDS: dict[type[AdapterConfig], tuple[str, ...]] = {
    LoRAConfig: _SHARED,
    PromptTuningConfig: (*_SHARED, "decoder"),
}
"""{config of each task's adapter: its fields that the multitask one has too}."""
_OF_SITES = (
    *("path", "d_in", "d_out", "bias", "kind", "r", "alpha"),
    *("num_experts", "transposed", "plus_one"),
)


def _sites(params: Adapter) -> list[Site]:
    return list(params.layout.sites.values())


class _Layouts:
    """The layouts of tasks' adapters made so far, as attributes. A compiled call can't make one,
    but it can look one up here, and each look-up sees those that were added since.
    """


@at_trace_time
def _known(
    config: type[AdapterConfig], values: tuple[Any, ...], sites: tuple[tuple[Any, ...], ...]
) -> str:
    """The name of the layout of each task's adapter, which is made if it isn't there.

    Args:
        config: the class of its config.
        values: its fields, those of `_FIELDS`.
        sites: what its sites are made of.
    """
    text = repr((config.__name__, values, sites))
    name = "of_" + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    if not hasattr(_Layouts, name):
        cfg = config(**dict(zip(_FIELDS[config], values, strict=True)))
        variant, scale_tensors = variant_for(config), dict[float, Tensor]()
        placed = [Site(**dict(zip(_OF_SITES, site, strict=True))) for site in sites]
        made = [site_for(variant, cfg, site, scale_tensors) for site in placed]
        setattr(_Layouts, name, Layout(variant, cfg, made))
    return name
