"""The base's last hidden states of an input, as transformers' models give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import StructureError
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
