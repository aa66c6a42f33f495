"""The check that an adapter has a tensor of the right shape for every leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .absent import ABSENT
from .adapter import Adapter
from .errors import StructureError

__all__ = ["check_shapes"]


def check_shapes(params: Adapter) -> None:
    """Check that every leaf is a tensor of the shape that its site asks for.

    Raises:
        StructureError: a leaf isn't; the message names the path, the leaf, what was expected and
            found, and what to do.
    """
    for path, specs in params.layout.specs.items():
        for name, tensor in params._data[path].items():
            expected = specs[name].shape
            if not isinstance(tensor, Tensor) or tensor.shape != expected:
                raise StructureError(_misfit(path, name, expected, tensor))


def _misfit(path: str, name: str, expected: Sequence[int], found: Any) -> str:
    where = f"{path!r} {name}: expected shape {tuple(expected)}, "
    if found is ABSENT:
        return (
            where + "found nothing: this is one part of a partition; put it back with "
            "ll.combine(trainable, frozen)"
        )
    if not isinstance(found, Tensor):
        return where + f"found {type(found).__name__}"
    if tuple(found.shape[1:]) == tuple(expected):
        return where + (
            f"found {tuple(found.shape)}: a stack of {found.shape[0]} adapters; ll.rows(stack, "
            f"ids) gives each row of a batch its own, torch.func.vmap(lambda p: ll.apply(model, "
            f"p, x))(stack) runs them all on the same batch, stack[i] is one of them"
        )
    return where + f"found {tuple(found.shape)}"
