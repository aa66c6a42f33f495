"""Batches of data as the arguments of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.errors import ConfigError

__all__ = ["arguments", "described"]


def arguments(
    model: nn.Module, batch: Any, has_loss: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as the model's arguments.

    Raises:
        ConfigError: the model can't take it.
    """
    if isinstance(batch, (tuple, list)) and has_loss:
        if not batch:
            raise ConfigError("calibration data: an empty tuple is no batch")
        return arguments(model, batch[0], False)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        signature = None
    args: tuple[Any, ...] = tuple(batch) if isinstance(batch, (tuple, list)) else ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = dict(batch)
        if signature is not None and "labels" not in signature.parameters:
            kwargs.pop("labels", None)
    elif not isinstance(batch, (tuple, list)):
        args = (batch,)
    if signature is not None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            # The batch is (input, target), as a DataLoader of pairs gives it.
            if len(args) == 2:
                return arguments(model, args[0], False)
            hint = "; a pair is (input, target)" if len(args) > 1 else ""
            what = f"{type(model).__name__}.forward can't take a batch of {described(batch)}"
            raise ConfigError(f"calibration data: {what}: {error}{hint}") from None
    return args, kwargs


def described(value: Any) -> str:
    """A batch or a loss in a few words, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(str, value))}"
    return (
        f"{len(value)} in a {type(value).__name__}"
        if isinstance(value, (tuple, list))
        else f"a {type(value).__name__}"
    )
