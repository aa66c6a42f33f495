"""The memory of a bank: leaves with a leading axis of slots, written one slot at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.adapter_shapes import check_shapes
from ..core.errors import StructureError
from ..core.layout import Layout, LeafSpec
from ..core.stacked import OF_MEMBERS, number_of
from ..core.torch_internals import copy_each, shares_memory
from .members import padded

__all__ = ["Slots", "check_leaves"]


class Slots:
    """Leaves (slots, ...) that nobody else ever holds: `views` gives aliases of them.

    An alias has a version counter of its own, so that a write on one slot doesn't trouble the
    graphs that read others.

    Attributes:
        count: the number of slots.
        leaves: {path: {lora_name: (count, ...)}}, without those of `OF_MEMBERS`.
        numbers: (3, sites, count), for each site and slot what it has for each of `OF_MEMBERS`.
    """

    def __init__(self, leaves: Mapping[str, Mapping[str, Tensor]], numbers: Tensor) -> None:
        self.count, self.leaves, self.numbers = numbers.shape[-1], leaves, numbers
        self._written: tuple[object, Tensor] = (None, numbers)  # (sites, their numbers)

    @staticmethod
    def made(
        layout: Layout, like: Adapter, count: int, device: torch.device, old: Slots | None
    ) -> Slots:
        """Memory of its own for leaves of a layout, with what is in an older one, slot by slot.

        Args:
            layout: what the leaves have to be wide enough for; never narrower than before.
            like: an adapter with all sites that are new, for dtypes and for what free slots hold.
            count: how many slots; never fewer than before.
            device: where it is.
            old: the older memory.
        """
        before: Mapping[str, Mapping[str, Tensor]] = {} if old is None else old.leaves
        leaves = {
            path: {
                name: _leaf(before, like, path, name, layout.specs[path][name], count, device)
                for name in names
                if name not in OF_MEMBERS
            }
            for path, names in layout.names.items()
        }
        numbers = torch.zeros(
            len(OF_MEMBERS), len(leaves), count, dtype=_wide(leaves), device=device
        )
        if old is not None:
            rows = [list(leaves).index(path) for path in before]
            numbers[:, rows, : old.count] = old.numbers.to(numbers.dtype)
        return Slots(leaves, numbers)

    def write(self, slot: int, adapter: Adapter) -> None:
        """Write an adapter's leaves into a slot."""
        places: list[Tensor] = []
        values: list[Tensor] = []
        for path, tensors in adapter._data.items():
            own = self.leaves[path]
            for name, t in tensors.items():
                place = own[name].select(0, slot)
                if place.shape != t.shape:
                    spec = adapter.layout.specs[path][name]
                    t = padded(t, spec._replace(shape=tuple(place.shape)))
                places.append(place)
                values.append(t)
        copy_each(places, values)
        sites = adapter.layout.sites
        if sites is not self._written[0]:
            numbers = [
                [number_of(name, sites.get(path)) for path in self.leaves] for name in OF_MEMBERS
            ]
            self._written = (sites, torch.tensor(numbers, dtype=self.numbers.dtype))
        self.numbers.select(-1, slot).copy_(self._written[1])

    def free(self, slot: int) -> None:
        """Note that a slot holds no adapter."""
        self.numbers.select(-1, slot).zero_()

    @torch.inference_mode(False)
    def views(self, names: Mapping[str, tuple[str, ...]]) -> list[Tensor]:
        """The leaves of these names in order, as aliases of the memory; numbers are copies."""
        of_members = {
            name: dict(zip(self.leaves, numbers.unbind(0), strict=True))
            for name, numbers in zip(OF_MEMBERS, self.numbers.clone().unbind(0), strict=True)
        }
        return [
            of_members[name][path] if name in of_members else self.leaves[path][name].data
            for path, leaves in names.items()
            for name in leaves
        ]

    def are_held(self) -> bool:
        """Whether anybody still holds an alias."""
        return any(shares_memory(t) for leaves in self.leaves.values() for t in leaves.values())


_PLAIN = (Tensor, nn.Parameter)


def check_leaves(adapter: Adapter, leaves: Mapping[str, Mapping[str, Tensor]], what: str) -> None:
    """Refuse an adapter that isn't made of plain tensors of its layout's shapes, in the dtypes of
    others.

    Args:
        adapter: the adapter.
        leaves: the others', {path: {lora_name: tensor}}.
        what: which one it is, for messages.

    Raises:
        StructureError: the message names the first leaf.
    """
    for path, tensors in adapter._data.items():
        own, specs = leaves.get(path, {}), adapter.layout.specs[path]
        for name, t in tensors.items():
            if type(t) not in _PLAIN or t.shape != specs[name].shape:
                check_shapes(adapter)
            if type(t) not in _PLAIN or t.layout is not torch.strided or t.is_meta:
                raise StructureError(
                    f"{what}: {path!r} {name}: expected a plain tensor with values, found "
                    f"{type(t).__name__}, {t.layout}, on {t.device}"
                )
            if own and t.dtype is not own[name].dtype:
                raise StructureError(
                    f"{what} differs at {path!r} {name}: {t.dtype}, the others "
                    f"{own[name].dtype}; take ll.cast(adapter, {own[name].dtype})"
                )


def _leaf(
    before: Mapping[str, Mapping[str, Tensor]],
    like: Adapter,
    path: str,
    name: str,
    spec: LeafSpec,
    count: int,
    device: torch.device,
) -> Tensor:
    """A leaf (count, ...) with the older one in its corner.

    Nobody reads a free slot, but what it holds takes part in what is computed and left out: no
    directions, or what another adapter has there.
    """
    old = before[path][name] if path in before else None
    first = like._data[path][name].detach() if old is None else old[0]
    new = torch.zeros((count, *spec.shape), dtype=first.dtype, device=device)
    if spec.rank_axis is None:
        new[:] = first
    if old is not None:
        new[tuple(map(slice, old.shape))] = old
    return new


def _wide(leaves: Mapping[str, Mapping[str, Tensor]]) -> torch.dtype:
    """The dtype of the numbers that go with these leaves: float32 at least."""
    dtype = torch.float32
    for tensors in leaves.values():
        for t in tensors.values():
            if t.is_floating_point():
                dtype = torch.promote_types(dtype, t.dtype)
    return dtype
