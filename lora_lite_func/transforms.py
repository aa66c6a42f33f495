"""Tree algebra: partition and combine, stack and unstack, scale, cast, counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .adapter import ABSENT, Adapter, leaves, replace
from .errors import StructureError, UnsupportedError

__all__ = ["cast", "combine", "num_params", "partition", "scale", "stack", "summary", "unstack"]


def partition(params: Adapter, keep: Callable[[str, str], bool] | None = None) -> tuple[Adapter, Adapter]:
    """Two adapters of the same sites, (trainable, frozen): each leaf is in one and absent (no leaf at all) in the other.

    `torch.func.grad(lambda t: loss(ll.apply(model, ll.combine(t, frozen), x)))(trainable)`

    Args:
        params: what to split.
        keep: (path, lora_name) -> whether the leaf goes first; by default what the method calls trainable.
    """
    rule = keep or (lambda path, name: params.layout.trainable[path][name])
    first = {path: {n: t if rule(path, n) else ABSENT for n, t in ts.items()} for path, ts in params._data.items()}
    second = {path: {n: ABSENT if rule(path, n) else t for n, t in ts.items()} for path, ts in params._data.items()}
    return replace(params, first), replace(params, second)


def combine(*parts: Adapter) -> Adapter:
    """The parts of a partition put together again: each leaf from the one part that has it.

    Raises:
        StructureError: the parts are of different adapters, or a leaf is in several or in none.
    """
    first = parts[0]
    for other in parts[1:]:
        _same_layout(first, other, "combine")
    data: dict[str, dict[str, Any]] = {}
    for path, names in first.layout.names.items():
        data[path] = {}
        for name in names:
            present = [part._data[path][name] for part in parts if part._data[path][name] is not ABSENT]
            if len(present) != 1:
                raise StructureError(f"combine: {path!r} {name} is in {len(present)} of the {len(parts)} parts, expected one")
            data[path][name] = present[0]
    return replace(first, data)


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """K adapters with equal sites and settings as one, every leaf with a leading axis of K; for torch.func.vmap.

    Raises:
        StructureError: nothing to stack, or the first difference between two of them.
    """
    adapters = list(adapters)
    if not adapters:
        raise StructureError("stack: expected at least one adapter, found none")
    for i, other in enumerate(adapters[1:], 1):
        _same_layout(adapters[0], other, f"stack: number {i}")
    columns = zip(*(leaves(a) for a in adapters), strict=True)
    return _refill(adapters[0], [c[0] if c[0] is ABSENT else torch.stack(c) for c in columns])


def unstack(stacked: Adapter) -> list[Adapter]:
    """The K adapters of a stack, as views.

    Raises:
        StructureError: not a stack.
    """
    counts = set()
    for path, expected in stacked.layout.expected.items():
        for name, leaf in stacked._data[path].items():
            if leaf is ABSENT:
                continue
            if leaf.ndim != len(expected[name]) + 1 or tuple(leaf.shape[1:]) != expected[name]:
                shape = ", ".join(map(str, expected[name]))
                raise StructureError(f"unstack: {path!r} {name}: expected (K, {shape}), found {tuple(leaf.shape)}")
            counts.add(leaf.shape[0])
    if len(counts) != 1:
        raise StructureError(f"unstack: expected one leading size, found {sorted(counts) or 'no tensors'}")
    flat = list(leaves(stacked))
    return [_refill(stacked, [t if t is ABSENT else t[i] for t in flat]) for i in range(counts.pop())]


def scale(params: Adapter, strength: float | Tensor) -> Adapter:
    """The adapter at `strength` times its strength: 0 is the base, 1 changes nothing, -1 turns it round. Pure, same structure.

    Additive methods scale their update; gates, angles and rotations move along their path from the identity.

    Args:
        params: the adapter; a stack is scaled member by member with a tensor of shape (K,).
        strength: a float, or a tensor (differentiable, and fit for vmap).

    Raises:
        UnsupportedError: the method has no such path.
    """
    layout = params.layout
    change = layout.variant.scale
    if change is None:
        raise UnsupportedError(f"{layout.variant.name} has no `scale` function in its Variant, so its strength can't be set")
    if isinstance(strength, Tensor) and strength.ndim == 1:
        return torch.func.vmap(scale)(params, strength)
    return replace(params, {path: change(layout.config, tensors, strength) for path, tensors in params._data.items()})


def cast(params: Adapter, dtype: torch.dtype) -> Adapter:
    """The floating leaves in another dtype; those that a method keeps in float32 at least stay so.

    Raises:
        StructureError: not a floating dtype.
    """
    if not dtype.is_floating_point:
        raise StructureError(f"cast: expected a floating dtype, found {dtype}")
    least = params.layout.least

    def leaf(path: str, name: str, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        at_least = least[path][name]
        return t.to(dtype if at_least is None else torch.promote_types(dtype, at_least))

    return replace(params, {path: {n: leaf(path, n, t) for n, t in ts.items()} for path, ts in params._data.items()})


def num_params(params: Adapter, *, trainable_only: bool = True) -> int:
    """How many numbers the adapter holds (a stack counts all its members)."""
    layout = params.layout
    return sum(
        t.numel()
        for path, ts in params._data.items()
        for n, t in ts.items()
        if isinstance(t, Tensor) and (layout.trainable[path][n] or not trainable_only)
    )


def summary(params: Adapter) -> str:
    """The adapter as a table: what `print(params)` shows."""
    return repr(params)


def _refill(params: Adapter, flat: list[Any]) -> Adapter:
    it = iter(flat)
    return replace(params, {path: {name: next(it) for name in names} for path, names in params.layout.names.items()})


def _same_layout(a: Adapter, b: Adapter, what: str) -> None:
    """Refuse two adapters whose static data differ, naming the first difference."""
    if not isinstance(b, Adapter) or not isinstance(a, Adapter):
        raise StructureError(f"{what}: expected an Adapter, found {type(b if isinstance(a, Adapter) else a).__name__}")
    if a.layout == b.layout:
        return
    if a.layout.variant.name != b.layout.variant.name:
        raise StructureError(f"{what} is {b.layout.variant.name!r}, the first {a.layout.variant.name!r}: one method at a time")
    for path in a.sites.keys() ^ b.sites.keys():
        raise StructureError(f"{what}: site {path!r} is in {'the first' if path in a.sites else 'the other'} alone")
    for path, site in a.sites.items():
        if site != b.sites[path]:
            raise StructureError(f"{what} differs at {path!r}: {b.sites[path]}, the first {site}")
    raise StructureError(f"{what} has other settings: {b.config}, the first {a.config}")
