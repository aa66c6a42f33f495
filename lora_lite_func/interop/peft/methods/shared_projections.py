"""Tensors that all modules of a PEFT file share: each module uses a leading corner of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError
from ...assembly import ModuleEntry
from ...metadata import ConfigReader

__all__ = ["common_leaf", "corner", "joined", "shared_tensor"]


def shared_tensor(reader: ConfigReader, entry: ModuleEntry, name: str) -> Tensor:
    """Return the tensor of this name that all modules of the file share.

    Raises:
        CheckpointError: the file was saved without it.
    """
    if name not in entry.shared:
        raise CheckpointError(
            f"{reader.where}: no {name} among its tensors (save_projection=false): PEFT draws it "
            f"again from the sizes of all targets; save it in PEFT with save_projection=True"
        )
    return entry.shared[name]


def common_leaf(adapters: Sequence[Adapter], name: str, method: str) -> Tensor:
    """Return the one leaf of this name that all sites have.

    Raises:
        UnsupportedError: they have several.
    """
    first, *others = [held[name] for a in adapters for held in a.values()]
    if not all(t is first or torch.equal(t, first) for t in others):
        raise UnsupportedError(
            f"to_peft: one {method} file has one {name}, these adapters have several; write a "
            f"folder for each"
        )
    return first


def corner(t: Tensor, name: str, *sizes: int) -> Tensor:
    """Return the leading corner of these sizes.

    Raises:
        CheckpointError: the tensor is smaller, or has another number of dimensions.
    """
    if t.ndim != len(sizes) or any(n < size for n, size in zip(t.shape, sizes, strict=True)):
        raise CheckpointError(f"{name}: expected at least {sizes}, found {tuple(t.shape)}")
    return t[tuple(slice(size) for size in sizes)].contiguous()


def joined(parts: Sequence[Tensor], name: str, way_out: str, least: Sequence[int] = ()) -> Tensor:
    """Return the smallest tensor, at least as large as `least`, that has all parts as leading
    corners.

    Raises:
        UnsupportedError: the parts disagree where they overlap.
    """
    shapes = [p.shape for p in parts] + ([least] if least else [])
    whole = torch.zeros([max(sizes) for sizes in zip(*shapes, strict=True)], dtype=parts[0].dtype)
    for part in sorted(parts, key=torch.numel):
        whole[tuple(slice(n) for n in part.shape)] = part.to(whole)
    for part in parts:
        if not torch.equal(whole[tuple(slice(n) for n in part.shape)], part.to(whole)):
            raise UnsupportedError(
                f"to_peft: PEFT has one {name} for all modules, and these differ by shape; "
                f"{way_out}"
            )
    return whole
