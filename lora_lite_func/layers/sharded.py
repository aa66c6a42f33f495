"""Layers that are shared out over processes by tensor parallelism.

Torch's `parallelize_module` makes their weights DTensors, and their calls get and give DTensors. So
an adapter around such a call is the same one in every process, and follows the layer's placement.
Where a layer's call gets and gives parts, no adapter of the whole layer can go around it.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.torch_internals import CALLS_SHARDED, is_sharded

__all__ = ["ADAPTED_ITSELF", "check_parallel", "replicated", "whole"]

ADAPTED_ITSELF = "here it would have to be adapted itself"
"""What `check_parallel` is told where an adapter doesn't go around a layer's call."""

_WHOLE = "adapt the whole model (full_tensor() gives each whole weight)"


def replicated(t: Tensor, mesh: Any) -> Tensor:
    """A tensor that is the same in every process as a DTensor of a mesh.

    Its gradient is summed over the processes.
    """
    dtensor = importlib.import_module("torch.distributed.tensor")
    everywhere = [dtensor.Replicate()] * mesh.ndim
    made: Tensor = dtensor.DTensor.from_local(t, mesh, everywhere, run_check=False)
    return made


def whole(t: Tensor) -> Tensor:
    """A tensor as a plain one, gathered from all processes where it is sharded."""
    held: Any = t
    made: Tensor = held.full_tensor() if is_sharded(t) else t
    return made


def check_parallel(module: Any, path: str, name: str = "weight", why: str | None = None) -> None:
    """Refuse a layer whose share no adapter of the whole layer can go around.

    Args:
        module: the layer.
        path: its path.
        name: the tensor that the adapter belongs to.
        why: what the tensor itself is needed for; None where the adapter goes around the layer's
            call.

    Raises:
        UnsupportedError: the tensor itself is needed and is a DTensor, or the layer's call gets and
            gives parts (transformers' tp_plan).
    """
    own_forward = module.__dict__.get("forward")
    if own_forward is not None and _is_of_transformers(own_forward):
        raise UnsupportedError(
            f"{path!r} ({type(module).__name__}): transformers' tp_plan shares it out over "
            f"processes, so that its call gets and gives parts; load the model without tp_plan and "
            f"use torch.distributed.tensor.parallel.parallelize_module, or {_WHOLE}"
        )
    if why is None and own_forward is not None:
        why = "a forward of its own goes around its call"
    tensor: Any = module._parameters.get(name)
    if why is None and not CALLS_SHARDED:
        why = "that was found right from torch 2.13 on (on 2.8 values were wrong)"
    if why is not None and is_sharded(tensor):
        placements = ", ".join(map(str, tensor.placements))
        raise UnsupportedError(
            f"{path!r} ({type(module).__name__}): its {name} is sharded over processes (DTensor, "
            f"{placements}), and {why}; {_WHOLE}, or leave it out with exclude_names"
        )


def _is_of_transformers(forward: Any) -> bool:
    module_name = getattr(forward, "__module__", None) or ""
    return module_name.startswith(("transformers.distributed", "transformers.integrations.tensor"))
