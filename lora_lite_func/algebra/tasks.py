"""The tasks of a multitask adapter, as a stack."""

from __future__ import annotations

import dataclasses

from ..core.adapter import Adapter, check_shapes, rebuild
from ..core.config import AdapterConfig
from ..core.errors import UnsupportedError
from ..core.layout import Layout
from ..core.registry import variant_for
from ..variants import MPTConfig, PromptTuningConfig
from ..variants.mpt import of_tasks
from .alike import check_adapter

__all__ = ["tasks"]


def tasks(params: Adapter) -> Adapter:
    """The tasks of a multitask prompt tuning as a stack of plain prompt tunings, one for each:
    `ll.apply(model, ll.rows(ll.tasks(params), task_ids), ids)`.

    Gradients go through it to what the tasks share and to what is each one's own. Pure.

    Args:
        params: an adapter of `ll.MPTConfig`.

    Raises:
        StructureError: not an Adapter, a stack, or a part of a partition.
        UnsupportedError: another method's.
    """
    check_adapter(params, "tasks")
    cfg = params.config
    if not isinstance(cfg, MPTConfig):
        raise UnsupportedError(
            f"tasks: {params.layout.variant.name} has no tasks; an adapter of ll.MPTConfig has"
        )
    check_shapes(params)
    shared = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(AdapterConfig)}
    plain = PromptTuningConfig(**shared)
    layout = Layout(variant_for(PromptTuningConfig), plain, params.sites.values())
    return rebuild(layout, [of_tasks(tensors) for tensors in params._data.values()])
