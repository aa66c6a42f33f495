"""The hidden state in a whole module's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..core.errors import UnsupportedError
from .results import mapping_with, sequence_with

__all__ = ["hidden_state"]


def hidden_state(output: Any, path: str, width: int) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The hidden state (..., width) in a module's output, and how to put another in its place.

    An output that is a tensor is the hidden state itself. In a tuple, a list or a mapping (such as
    a transformers ModelOutput) it is the first member.

    Raises:
        UnsupportedError: there is no hidden state; the message names the path.
    """
    if isinstance(output, Tensor):
        return _checked(output, path, width), lambda h: h
    if isinstance(output, Mapping) and output:
        name = next(iter(output))
        first = _checked(output[name], path, width)
        return first, lambda h: mapping_with(output, {**dict(output.items()), name: h})
    if isinstance(output, (tuple, list)) and output:
        first = _checked(output[0], path, width)
        return first, lambda h: sequence_with(output, [h, *output[1:]])
    raise UnsupportedError(
        f"{path!r}: expected a hidden state from the module, found {type(output).__name__}; name "
        f"a block instead"
    )


def _checked(h: Any, path: str, width: int) -> Tensor:
    if not isinstance(h, Tensor) or not h.is_floating_point() or h.ndim < 1 or h.shape[-1] != width:
        found = (
            f"a {h.dtype} tensor of shape {tuple(h.shape)}"
            if isinstance(h, Tensor)
            else type(h).__name__
        )
        raise UnsupportedError(
            f"{path!r}: expected a hidden state (..., {width}) first in the module's output, "
            f"found {found}"
        )
    return h
