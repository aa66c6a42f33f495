"""The base's last hidden states of an input, as transformers' models give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import StructureError
from ..layers.signatures import arguments_of
from .apply import apply

__all__ = ["hidden_states"]


def hidden_states(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], use_cache: bool = False
) -> Tensor:
    """The base's last hidden states (N, T, d), without a graph.

    Args:
        model: the base.
        args: its positional arguments.
        kwargs: its keyword arguments; labels are left out.
        use_cache: whether a cache among them is used and filled.

    Raises:
        StructureError: the model gives none.
    """
    given = {name: value for name, value in kwargs.items() if name != "labels"}
    given |= {"use_cache": use_cache, "output_hidden_states": True, "return_dict": True}
    if torch.compiler.is_dynamo_compiling() and hasattr(model, "base_model_prefix"):
        return _of_body(model, args, given)
    with torch.no_grad():
        output = apply(model, (), *args, **given)
    states = getattr(output, "hidden_states", None)
    if not states or not isinstance(states[-1], Tensor) or states[-1].ndim != 3:
        raise StructureError(
            f"XLoRA: expected an output with hidden_states (N, T, d), found "
            f"{type(output).__name__}; of another model, make the weights yourself: "
            f"ll.mixed(x.stack, x.weights(hidden))"
        )
    last: Tensor = states[-1]
    return last


def _of_body(model: Any, args: tuple[Any, ...], given: Mapping[str, Any]) -> Tensor:
    """The last hidden states of what a transformers model has below its head.

    A compiled call takes these, since transformers records all hidden states by hooks that no graph
    can have in it. They are the last of those.
    """
    body = model.base_model
    names = arguments_of(type(body))
    own = {name: value for name, value in given.items() if name in names}
    with torch.no_grad():
        output = apply(body, (), *args, **own | {"output_hidden_states": False})
    last: Tensor = output.last_hidden_state
    return last
