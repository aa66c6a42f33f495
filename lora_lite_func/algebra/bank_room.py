"""Room: which slots of a bank's memory hold an adapter, which are free, and when they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..core.adapter import Adapter, leaves, rebuild
from ..core.layout import Layout
from ..core.stacked import LENGTH, SCALING, Stacked, who_lacks
from .bank_slots import Slots, check_leaves
from .members import Common

__all__ = ["Room"]

_SPARE = 8
"""There is a spare slot for each so many of the capacity, at least one."""


class Room:
    """Slots for adapters of one method, as wide as the widest of them.

    A slot that was left may still be read by somebody who holds the memory, so it is free only when
    nobody does. Where that doesn't happen in time, the memory is copied to one that nobody holds.

    Attributes:
        capacity: for how many adapters there is room before all is copied.
    """

    def __init__(
        self, first: Adapter, capacity: int, device: torch.device | None, what: str
    ) -> None:
        self._common = Common()
        self._common.check(first.layout, what)
        check_leaves(first, {}, what)
        self.capacity = capacity
        self._device = device or next(t.device for t in leaves(first))
        self._empty = Layout(first.layout.variant, first.layout.config, ())
        self._members: list[Layout] = []  # by slot, as are the largest ranks
        self._ranks: list[int] = []
        self._free: list[int] = []
        self._left: list[int] = []
        self._layout: Stacked | None = None  # that of the present members; None: not made yet
        self._frame, self._memory = self._moved(first, capacity)

    # ------------------------------------------------------------------------------------- reading
    def stack(self, labels: Mapping[int, str]) -> Adapter:
        """All slots as a stack, without a copy.

        Args:
            labels: {slot: the name of its adapter}.
        """
        if self._layout is None:
            groups: dict[tuple[str, ...], list[int]] = {}
            for slot, layout in enumerate(self._members):
                groups.setdefault(tuple(layout.sites), []).append(slot)
            self._layout = self._frame.around(
                self._members,
                [labels.get(slot) for slot in range(len(self._members))],
                self._ranks,
                who_lacks(self._frame.sites, groups),
            )
        return rebuild(self._layout, self._memory.views(self._layout.names))

    # ------------------------------------------------------------------------------------- writing
    def take(self, adapter: Adapter, count: int, what: str) -> int:
        """Write an adapter to a free slot, and give its number.

        Args:
            adapter: the adapter.
            count: how many adapters there are to be, this one among them, without what is left
                after it.
            what: which one it is, for messages.

        Raises:
            StructureError: it doesn't stack with the others.
        """
        self._common.check(adapter.layout, what)
        check_leaves(adapter, self._memory.leaves, what)
        self._make_room(adapter, count)
        self._common.take(adapter.layout)
        slot = self._free[-1]
        self._memory.write(slot, adapter)
        self._free.pop()
        self._members[slot], self._layout = adapter.layout, None
        self._ranks[slot] = max(site.r for site in adapter.layout.sites.values())
        return slot

    def leave(self, slot: int) -> None:
        """Take a slot out of use."""
        self._memory.free(slot)
        self._members[slot], self._ranks[slot], self._layout = self._empty, 0, None
        self._left.append(slot)

    def _make_room(self, adapter: Adapter, count: int) -> None:
        """Make sure that there is a free slot that is wide enough."""
        capacity = self.capacity
        while count > capacity:
            capacity *= 2
        if capacity == self.capacity and _covers(self._frame, adapter.layout):
            if not self._free and not self._memory.are_held():
                self._free, self._left = self._left, []
            if self._free:
                return
        self._frame, self._memory = self._moved(adapter, capacity)

    @torch.inference_mode(False)
    def _moved(self, adapter: Adapter, capacity: int) -> tuple[Stacked, Slots]:
        """(frame, memory): all slots copied to where nobody holds them, with room for an adapter.

        The frame is the layout of the memory, whoever the members are.
        """
        before, count = len(self._members), capacity + max(1, capacity // _SPARE)
        members = [*self._members, *[self._empty] * (count - before)]
        new = adapter.layout.sites.values()
        if before:
            sites = [*self._frame.sites.values(), *new]
            frame = Stacked(members, None, sites, self._frame.extra)
        else:
            frame = Stacked(members, None, new)
        old = self._memory if before else None
        memory = Slots.made(frame, adapter, count, self._device, old)
        self._free = [*range(count - 1, before - 1, -1), *self._left, *self._free]
        self._left, self._members, self._layout = [], members, None
        self._ranks += [0] * (count - before)
        self.capacity = capacity
        return frame, memory


def _covers(frame: Stacked, layout: Layout) -> bool:
    """Whether there is a leaf, wide enough, for all that an adapter has."""
    for path, site in layout.sites.items():
        own = frame.sites.get(path)
        if own is None or site.r > own.r:
            return False
        if site.scaling != own.scaling and SCALING not in frame.names[path]:
            return False
        counts = layout.variant.virtual is not None
        if counts and site.r != own.r and LENGTH not in frame.names[path]:
            return False
    return True
