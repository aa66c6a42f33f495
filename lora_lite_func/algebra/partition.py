"""partition and combine: an adapter as its trainable and its frozen part, and whole again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from ..core.absent import ABSENT
from ..core.adapter import Adapter, keys, leaves, rebuild, replace
from ..core.arguments import function
from ..core.errors import StructureError
from .alike import check_same_layout, map_adapters

__all__ = ["combine", "partition"]


Tree = TypeVar("Tree")


@overload
def partition(
    params: Adapter, keep: Callable[[str, str], bool] | None = None
) -> tuple[Adapter, Adapter]: ...
@overload
def partition(
    params: Tree, keep: Callable[[str, str], bool] | None = None
) -> tuple[Tree, Tree]: ...
def partition(params: Any, keep: Callable[[str, str], bool] | None = None) -> Any:
    """Two adapters of the same sites, (trainable, frozen): each leaf is in one and absent (no leaf
    at all) in the other.

    `ll.grad(lambda t: loss(ll.apply(model, ll.combine(t, frozen), x)))(trainable)`

    Args:
        params: what to split: an adapter, or a tuple, list or dict of them, which give two of the
            same.
        keep: (path, lora_name) -> whether the leaf goes first, asked once per leaf; by default what
            the method calls trainable.

    Raises:
        StructureError: not an Adapter, nor a tuple, list or dict of them.
    """
    halves: list[tuple[Adapter, Adapter]] = []
    if keep is not None:
        function(keep, "partition: keep")

    def split(adapter: Adapter) -> Adapter:
        halves.append(_partition(adapter, keep))
        return halves[-1][0]

    first = map_adapters(split, params, "partition")
    rest = iter(halves)
    return first, map_adapters(lambda _: next(rest)[1], params, "partition")


def _partition(params: Adapter, keep: Callable[[str, str], bool] | None) -> tuple[Adapter, Adapter]:
    """(trainable, frozen) of one adapter."""
    rule = keep
    if rule is None:
        rule = lambda path, name: params.layout.specs[path][name].trainable  # noqa: E731
    first = [bool(rule(path, name)) for path, name in keys(params)]
    flat = list(leaves(params))
    return (
        rebuild(
            params.layout, [t if here else ABSENT for t, here in zip(flat, first, strict=True)]
        ),
        rebuild(
            params.layout, [ABSENT if here else t for t, here in zip(flat, first, strict=True)]
        ),
    )


@overload
def combine(*parts: Adapter) -> Adapter: ...
@overload
def combine(*parts: Tree) -> Tree: ...
def combine(*parts: Any) -> Any:
    """The parts of a partition put together again: each leaf from the one part that has it.

    Args:
        *parts: adapters, or tuples, lists or dicts of them, all alike.

    Raises:
        StructureError: no parts, parts of different adapters, or a leaf in several or in none.
    """
    if not parts:
        raise StructureError("combine: expected the parts of an adapter, found none")
    return map_adapters(_combine, parts[0], "combine", *parts[1:])


def _combine(*parts: Adapter) -> Adapter:
    """One adapter of its parts."""
    first = parts[0]
    for other in parts:
        check_same_layout(first, other, "combine")
    data: dict[str, dict[str, Any]] = {}
    for path, names in first.layout.names.items():
        data[path] = {}
        for name in names:
            present = [
                part._data[path][name] for part in parts if part._data[path][name] is not ABSENT
            ]
            if len(present) != 1:
                raise StructureError(
                    f"combine: {path!r} {name} is in {len(present)} of the {len(parts)} parts, "
                    f"expected one"
                )
            data[path][name] = present[0]
    return replace(first, data)
