"""The arguments that a class's forward lists."""

from __future__ import annotations

import inspect
from typing import Any

from ..core.torch_internals import at_trace_time
from ..core.weak_memo import WeakMemo

__all__ = ["arguments_of"]


def _arguments(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(cls, "_ll_base", cls).forward).parameters)[1:]


_ARGUMENTS = WeakMemo(_arguments)


@at_trace_time
def arguments_of(cls: type) -> tuple[str, ...]:
    """The names of the arguments of a class's forward, in order."""
    return _ARGUMENTS(cls)
