"""Generation by an X-LoRA: each step's first pass goes on from a cache of the base's own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..core.errors import StructureError, UnsupportedError
from .apply import apply
from .bind import bind
from .hidden_states import hidden_states

__all__ = ["generate"]


def generate(
    mixed: Callable[[Tensor], Any], model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """`model.generate(*args, **kwargs)` where every call is two: the base's, and the model's with
    the adapters that `mixed` makes of its hidden states.

    Raises:
        StructureError: the model has no `generate`.
        UnsupportedError: the base's cache can't follow the model's.
    """
    if not callable(getattr(model, "generate", None)):
        raise StructureError(
            f"XLoRA: expected a model that generates, found {type(model).__name__}, which has no "
            f"`generate`"
        )
    # beams reorder the model's cache, which the base's wouldn't follow
    rest = {**kwargs, "use_cache": False} if _beams(model, kwargs) > 1 else kwargs
    shell: Any = bind(model, ())
    steps = _Steps(mixed, model)

    @functools.wraps(shell.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return steps.call(*args, **kwargs)

    shell.forward = forward
    return shell.generate(*args, **rest)


class _Steps:
    """The calls of one generation, and the cache of the base's passes."""

    def __init__(self, mixed: Callable[[Tensor], Any], model: Any) -> None:
        self.mixed, self.model = mixed, model
        self.cache: Any = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Both passes of a step."""
        name = next((name for name, value in kwargs.items() if _is_cache(value)), None)
        given = kwargs
        if name is not None:
            self._follow(kwargs[name])
            given = {**kwargs, name: self.cache}
        hidden = hidden_states(self.model, args, given, use_cache=name is not None)
        return apply(self.model, self.mixed(hidden), *args, **kwargs)

    def _follow(self, cache: Any) -> None:
        """Have a cache of as many tokens as the model's.

        Raises:
            UnsupportedError: there is none.
        """
        held = int(cache.get_seq_length())
        if held == 0:
            self.cache = copy.deepcopy(cache)
        elif self.cache is None or int(self.cache.get_seq_length()) != held:
            raise UnsupportedError(
                f"XLoRA: the model goes on from a cache of {held} tokens that this generation "
                f"hasn't filled step by step, so the base's hidden states of them aren't known; "
                f"give use_cache=False"
            )


def _is_cache(value: Any) -> bool:
    return callable(getattr(value, "get_seq_length", None)) and hasattr(value, "update")


def _beams(model: Any, kwargs: Mapping[str, Any]) -> int:
    """How many beams a generation has."""
    for holder in (kwargs.get("generation_config"), getattr(model, "generation_config", None)):
        if kwargs.get("num_beams") is not None:
            return int(kwargs["num_beams"])
        if getattr(holder, "num_beams", None) is not None:
            return int(holder.num_beams)  # type: ignore[union-attr]
    return 1
