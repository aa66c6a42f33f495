"""Recognising a layer that makes of each token its own output, whatever the other tokens are."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["is_token_wise"]


def is_token_wise(module: Any) -> bool:
    """Whether it is torch's linear layer, table, layer norm or RMS norm over the features, whose
    call takes each token alone.

    Other modules may be so too, but nothing in them tells.
    """
    base: Any = getattr(type(module), "_ll_base", type(module))
    if base.forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return len(module.normalized_shape) == 1
    return base.forward in (nn.Linear.forward, nn.Embedding.forward)
