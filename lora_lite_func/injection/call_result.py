"""The result of a model's call, without what belongs to virtual tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..core.errors import UnsupportedError
from ..layers.whole_calls import CACHES
from .results import mapping_with, sequence_with
from .virtual_front import Front

__all__ = ["own_tokens", "without_cache"]

_OF_TOKENS = ("start_logits", "end_logits")
"""Members of a result that have a number for each token."""

_OF_ENCODER = "encoder_"
"""What the names of members begin with that are of tokens which were encoded."""


def own_tokens(result: Any, front: Front, tokens: int) -> Any:
    """A result whose logits and hidden states are those of the row's own tokens alone.

    Attention weights stay whole, since they are between all tokens.

    Args:
        result: a tensor, a tuple, a mapping (a ModelOutput of transformers).
        front: where the virtual tokens stand.
        tokens: T, how many tokens a row has of its own.

    Raises:
        UnsupportedError: a result of another kind, in which they can't be found.
    """
    width = front.slots + tokens

    def cut(t: Tensor) -> Tensor:
        return front.own(t) if t.ndim == 3 and t.shape[1] == width else t

    def cut_of_tokens(t: Tensor) -> Tensor:
        return front.own(t) if t.ndim == 2 and t.shape[1] == width else t

    if not isinstance(result, Mapping):
        if not isinstance(result, (Tensor, tuple, list)):
            raise UnsupportedError(
                f"the result of a call with virtual tokens is a {type(result).__name__}, in which "
                f"a row's own tokens can't be found; return a tensor, a tuple or a dict"
            )
        return _each(result, cut)
    cuts = {
        name: _each(value, cut_of_tokens if name in _OF_TOKENS else cut)
        for name, value in result.items()
        if not str(name).startswith(_OF_ENCODER)
    }
    return mapping_with(result, {**result, **cuts})


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, or a tuple or list of them and of others, with the tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        members = [_each(one, change) for one in value]
        same = all(a is b for a, b in zip(members, value, strict=True))
        return value if same else sequence_with(value, members)
    return value


def without_cache(result: Any) -> Any:
    """A result without the cache that the call was given in the caller's place."""
    if not isinstance(result, Mapping) or not any(name in result for name in CACHES):
        return result
    return mapping_with(result, {k: v for k, v in result.items() if k not in CACHES})
