"""Adapters as plain data: nested dicts of tensors, one flat vector, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..core.absent import ABSENT
from ..core.adapter import Adapter, rebuild
from ..core.adapter_shapes import check_shapes
from ..core.errors import StructureError, nearest
from ..core.layout import Layout
from ..core.torch_internals import first_of
from .alike import check_adapter, every_adapter

__all__ = ["from_dict", "ravel", "to_dict"]


def to_dict(params: Adapter) -> dict[str, dict[str, Tensor]]:
    """{path: {lora_name: tensor}}: plain dicts of the adapter's own tensors, for what knows no
    adapters (torch.distributed.checkpoint, torch.save, json of shapes).

    Absent leaves are left out. `ll.from_dict(values, params)` is the way back.

    Args:
        params: an adapter, a stack, or a part of a partition.

    Raises:
        StructureError: not an Adapter.
    """
    check_adapter(params, "to_dict")
    return {
        path: {name: t for name, t in tensors.items() if t is not ABSENT}
        for path, tensors in params._data.items()
    }


def from_dict(values: Mapping[str, Mapping[str, Tensor]], like: Adapter | Layout) -> Adapter:
    """An adapter of nested dicts of tensors, as `ll.to_dict` gives them.

    Args:
        values: {path: {lora_name: tensor}}. What `like` has as absent may be left out.
        like: an adapter of the same sites, or its layout (`params.layout`). Of a layout, tensors
            have one adapter's shapes; of an adapter, its own (a stack's, a partition's).

    Raises:
        StructureError: a site or tensor is missing or unknown, or has another shape; with the path.
    """
    layout = like.layout if isinstance(like, Adapter) else like
    if not isinstance(layout, Layout):
        raise StructureError(
            f"from_dict: expected an Adapter or its layout, found {type(like).__name__}"
        )
    if not isinstance(values, Mapping):
        raise StructureError(
            f"from_dict: expected {{path: {{name: tensor}}}}, found {type(values).__name__}"
        )
    odd = first_of((path for path in values if path not in layout.names), None)
    if odd is not None:
        raise StructureError(f"from_dict: no site {odd!r}; {nearest(str(odd), layout.names)}")
    made = []
    for path, names in layout.names.items():
        found = values.get(path, {})
        if not isinstance(found, Mapping):
            raise StructureError(
                f"from_dict: {path!r}: expected {{name: tensor}}, found {type(found).__name__}"
            )
        odd = first_of((name for name in found if name not in names), None)
        if odd is not None:
            raise StructureError(f"from_dict: {path!r}: no tensor {odd!r}; {nearest(odd, names)}")
        for name in names:
            own = like._data[path][name] if isinstance(like, Adapter) else None
            made.append(_leaf(found, path, name, own))
    params = rebuild(layout, made)
    if not isinstance(like, Adapter):
        check_shapes(params)
    return params


def _leaf(found: Mapping[str, Any], path: str, name: str, like: Any) -> Any:
    """A leaf of the dict, checked against the leaf in the same place in `like`."""
    if name not in found:
        if like is ABSENT:
            return ABSENT
        raise StructureError(f"from_dict: {path!r}: no tensor {name!r}")
    t = found[name]
    if not isinstance(t, Tensor):
        raise StructureError(
            f"from_dict: {path!r} {name}: expected a tensor, found {type(t).__name__}"
        )
    if isinstance(like, Tensor) and t.shape != like.shape:
        raise StructureError(
            f"from_dict: {path!r} {name}: expected shape {tuple(like.shape)}, found "
            f"{tuple(t.shape)}"
        )
    return t


def ravel(params: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """(vector, unravel): all leaves as one vector (n,), and the function that makes the adapter of
    such a vector.

    Like jax.flatten_util.ravel_pytree. Differentiable, and fit for vmap: inside
    `torch.func.vmap` of a stack each member gives a vector. Leaves of several dtypes meet in the
    widest, and `unravel` gives each its own back. Ravel what is trained
    (`ll.partition(params)[0]`): absent leaves take no room.

    Args:
        params: an adapter or a part of a partition; or a tuple, list or dict of them.

    Returns:
        The vector, and a function of a vector (n,) of any floating dtype.

    Raises:
        StructureError: no Adapter, an integer leaf, leaves on several devices; in `unravel` a
            vector of another size.
    """
    every_adapter(params, "ravel")
    leaves, form = pytree.tree_flatten(params)
    odd = first_of((t for t in leaves if not isinstance(t, Tensor)), None)
    if odd is not None:
        raise StructureError(f"ravel: expected tensors, found {type(odd).__name__}")
    odd = first_of((t for t in leaves if not t.is_floating_point()), None)
    if odd is not None:
        raise StructureError(
            f"ravel: expected floating leaves, found one of {odd.dtype}; ravel the trainable "
            f"part, ll.partition(params)[0]"
        )
    devices = sorted({str(t.device) for t in leaves})
    if len(devices) > 1:
        raise StructureError(f"ravel: expected leaves on one device, found {', '.join(devices)}")
    kinds = [(t.shape, t.dtype, t.numel()) for t in leaves]
    size = sum(count for _, _, count in kinds)

    def unravel(vector: Tensor) -> Any:
        if not isinstance(vector, Tensor) or tuple(vector.shape) != (size,):
            found = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise StructureError(f"unravel: expected a vector ({size},), found {found}")
        parts = vector.split([count for _, _, count in kinds])
        return pytree.tree_unflatten(
            [
                part.view(shape).to(dtype)
                for part, (shape, dtype, _) in zip(parts, kinds, strict=True)
            ],
            form,
        )

    if not leaves:
        return torch.zeros(0), unravel
    wide = leaves[0].dtype
    for t in leaves:
        wide = torch.promote_types(wide, t.dtype)
    return torch.cat([t.reshape(-1).to(wide) for t in leaves]), unravel
