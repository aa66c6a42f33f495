"""Attention modules of transformers, whose attention is a function that their config names."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["attention_size", "is_attention"]

_INTERFACE = ("ALL_ATTENTION_FUNCTIONS", "eager_attention_forward")
_PROJECTIONS = ("k_proj", "v_proj", "o_proj")


def is_attention(module: Any) -> bool:
    """Whether a module is such attention, with projections of its own for keys and values."""
    attributes = getattr(module, "__dict__", {})
    children = attributes.get("_modules", {})
    if "config" not in attributes or not all(name in children for name in _PROJECTIONS):
        return False
    model_code = sys.modules.get(getattr(type(module), "_ll_base", type(module)).__module__)
    return "head_dim" in attributes and all(hasattr(model_code, name) for name in _INTERFACE)


def attention_size(module: Any) -> tuple[int, int] | None:
    """(width of what comes to it, width of all heads) of an attention module; None for others."""
    if not is_attention(module):
        return None
    return int(module.k_proj.in_features), int(module.o_proj.in_features)
