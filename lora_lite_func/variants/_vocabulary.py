"""Starts of virtual tokens from a model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, UnsupportedError

__all__ = ["check_decodes", "vocabulary"]


def vocabulary(
    table: Any, count: int, token_ids: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    """Embedded tokens (count, width): of given ids, or drawn.

    Raises:
        ConfigError: an id that the table hasn't.
    """
    if max(token_ids, default=0) >= table.size:
        raise ConfigError(f"token id {max(token_ids)}: the model has {table.size} of them")
    if token_ids:
        ids = torch.tensor([token_ids[i % len(token_ids)] for i in range(count)], device="cpu")
    else:
        ids = torch.randint(table.size, (count,), generator=generator, device="cpu")
    made: Tensor = table(ids)
    return made


def check_decodes(table: Any, decoder: bool) -> None:
    """Refuse virtual tokens for the decoder of a model that has none.

    Raises:
        UnsupportedError: it decodes nothing.
    """
    if decoder and not table.decodes:
        raise UnsupportedError(
            "decoder=True: the model doesn't encode and decode, so it decodes nothing that virtual "
            "tokens could stand in front of; leave it out"
        )
