"""Bank: adapters by name in one stack with room, which changes while it serves."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import torch
import torch.utils._pytree as pytree

from ..core.adapter import Adapter, member
from ..core.errors import StructureError, UnsupportedError, nearest, short_repr
from ..core.torch_internals import is_tracing_here, is_transformed
from .alike import check_adapter
from .bank_room import Room
from .stack import stack

__all__ = ["Bank"]


class Bank:
    """Adapters of one method by name, in one stack with room: `ll.rows(bank, ["fr", None, "de"])`.

    `add`, `replace` and `drop` write one slot and copy nothing else. Sites, ranks and strengths may
    differ, as in `ll.stack`. They may be called from any thread, beside running calls: whatever was
    made of the bank before keeps its values for as long as it (or a view of it, or a graph of
    autograd) lives. So a slot is written again only when nobody holds the bank's memory. There are
    spare slots for the time until then (an eighth of the capacity, at least one); where they are
    used up while calls run without a pause, the memory is copied once.

    The bank copies what it is given, without gradient. Values of it (`snapshot()`, rows) are for
    reading, their tensors are the bank's own memory. On an accelerator writes go to the current
    stream, like every operation.

    Args:
        adapters: {name: adapter} to begin with.
        capacity: for how many there is room. More than that double it, which copies all.
        device: where the memory is; by default where the first adapter is.

    Raises:
        StructureError: as `add`, or the capacity is no positive int.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter] | None = None,
        *,
        capacity: int = 8,
        device: str | torch.device | None = None,
    ) -> None:
        if type(capacity) is not int or capacity < 1:
            raise StructureError(
                f"Bank: capacity: expected a positive int, found {short_repr(capacity)}"
            )
        if isinstance(adapters, Adapter) or not isinstance(adapters or {}, Mapping):
            raise StructureError(
                f"Bank: expected {{name: adapter}}, found {type(adapters).__name__}"
            )
        self._lock = threading.RLock()
        self._capacity = max(capacity, len(adapters or ()))
        self._device = None if device is None else torch.device(device)
        self._slots: dict[str, int] = {}
        self._room: Room | None = None  # made for the first adapter
        for name, adapter in (adapters or {}).items():
            self.add(name, adapter)

    # ------------------------------------------------------------------------------------- reading
    @property
    def capacity(self) -> int:
        """For how many adapters there is room before the memory is doubled."""
        return self._capacity if self._room is None else self._room.capacity

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._slots))

    def __repr__(self) -> str:
        return f"Bank({len(self)} of {self.capacity}: {', '.join(self)})"

    def __getitem__(self, name: str) -> Adapter:
        """A copy of one adapter, bit by bit as it was given."""
        with self._lock:
            found = member(self.snapshot(), self._slot(name))
            copied: Adapter = pytree.tree_map(torch.clone, found)
            return copied

    def stack(self) -> Adapter:
        """A copy of all adapters as a stack, with their names: for files, vmap, `ll.mean`.

        Raises:
            StructureError: the bank is empty.
        """
        with self._lock:
            return stack({name: self[name] for name in self})

    def snapshot(self) -> Adapter:
        """The bank as it is now, as a stack with free places: nothing is copied, and nothing that
        is done to the bank later changes it. `ll.rows` takes it, and the bank itself, by name.

        Raises:
            StructureError: nothing was ever added.
        """
        with self._lock:
            if self._room is None:
                raise StructureError("Bank: it is empty; bank.add(name, adapter)")
            return self._room.stack({slot: name for name, slot in self._slots.items()})

    # ------------------------------------------------------------------------------------- writing
    def add(self, name: str, adapter: Adapter) -> None:
        """Put in an adapter under a new name.

        Raises:
            StructureError: the name is taken or empty, or the adapter doesn't stack with the
                others.
            UnsupportedError: inside a transform or a compiled call.
        """
        with self._lock:
            if not isinstance(name, str) or not name:
                raise StructureError(f"Bank: expected a name, found {short_repr(name)}")
            if name in self._slots:
                raise StructureError(f"Bank: {name!r} is there already; bank.replace(name, ...)")
            room, slot = self._written(name, adapter, len(self) + 1)
            self._slots[name], self._room = slot, room

    def replace(self, name: str, adapter: Adapter) -> None:
        """Put another adapter in the place of one. If it fails, the old one stays.

        Raises:
            StructureError: no such name, or the adapter doesn't stack with the others.
            UnsupportedError: inside a transform or a compiled call.
        """
        with self._lock:
            old = self._slot(name)
            room, self._slots[name] = self._written(name, adapter, len(self))
            room.leave(old)

    def drop(self, name: str) -> None:
        """Take an adapter out.

        Raises:
            StructureError: no such name.
            UnsupportedError: inside a transform or a compiled call.
        """
        with self._lock:
            _check_eager()
            slot = self._slot(name)
            assert self._room is not None
            del self._slots[name]
            self._room.leave(slot)

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            raise StructureError(f"Bank: no member {name!r}; {nearest(str(name), self._slots)}")
        return self._slots[name]

    @torch.no_grad()
    def _written(self, name: str, adapter: Adapter, count: int) -> tuple[Room, int]:
        """(the room, the slot) that an adapter was written to, where there are to be so many."""
        _check_eager()
        what = f"Bank: {name!r}"
        check_adapter(adapter, what)
        room = self._room or Room(adapter, self._capacity, self._device, what)
        return room, room.take(adapter, count, what)


def _check_eager() -> None:
    if is_transformed() or is_tracing_here():
        raise UnsupportedError(
            "a Bank is memory that is written on, which no transform or compiled call can follow; "
            "change it outside, or take ll.update on a stack inside"
        )
