"""ABSENT: what stands where a leaf was taken out of an adapter."""

from __future__ import annotations

__all__ = ["ABSENT"]


class _Absent:
    """A pytree node without children, which no transform sees."""

    def __repr__(self) -> str:
        return "absent"

    def __reduce__(self) -> str:
        return "ABSENT"  # pickle and copy find the one instance by this name


ABSENT = _Absent()
