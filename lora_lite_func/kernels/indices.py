"""The check of index tensors that a method with indices makes in its `Variant.validate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import StructureError

__all__ = ["check_indices"]


def check_indices(
    coordinates: Sequence[Tensor], sizes: Sequence[int], name: str, *, once: bool = True
) -> None:
    """Refuse indices that aren't whole numbers in their range, or entries that occur twice.

    Args:
        coordinates: a tensor (..., n) for each axis, floating or integer; leading axes are of
            several lists of n.
        sizes: how many indices there are along each axis.
        name: the name of the leaf, for messages.
        once: whether an entry may occur only once in its list.

    Raises:
        StructureError: NaN, a fraction, an index out of range, or the same entry twice.
    """
    if coordinates[0].is_meta or not coordinates[0].numel():
        return
    flat = torch.zeros_like(coordinates[0], dtype=torch.int64)
    for values, size in zip(coordinates, sizes, strict=True):
        wide = values.detach().double()
        wrong = ~((wide >= 0) & (wide < size) & (wide == wide.floor()))  # NaN is wrong too
        if wrong.any():
            raise StructureError(
                f"{name}: expected whole numbers from 0 to {size - 1}, found "
                f"{wide[wrong][0].item():g}"
            )
        flat = flat * size + wide.long()
    if not once:
        return
    ordered = flat.sort(-1).values
    twice = ordered[..., 1:] == ordered[..., :-1]
    if twice.any():
        entry = int(ordered[..., 1:][twice][0])
        place = [entry // sizes[-1], entry % sizes[-1]] if len(sizes) == 2 else entry
        raise StructureError(f"{name}: expected different entries, found {place} twice")
