"""What a model of transformers says of its packing, to whoever trains it or saves it."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["declared_dtype", "forget_packing", "tell_trainable"]

_ON_THE_MODEL = (
    "hf_quantizer",
    "quantization_method",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "_weight_conversions",
)
_ON_ITS_CONFIGS = ("quantization_config", "_is_quantized")


def tell_trainable(bound: Any) -> None:
    """Let a bound model say that it has adapters, where it is quantised.

    transformers trains no packed weights, and asks for that: without adapters, it refuses. Where it
    knows that gradients don't go through the packing, it goes on refusing.
    """
    quantizer = getattr(bound, "hf_quantizer", None)
    if getattr(bound, "is_quantized", False) and getattr(quantizer, "is_trainable", False):
        bound.__dict__["_hf_peft_config_loaded"] = True


def declared_dtype(model: Any) -> torch.dtype | None:
    """The dtype that a quantised model of transformers has between its layers; None for others."""
    config = getattr(model, "config", None)
    if not getattr(model, "is_quantized", False):
        return None
    found = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return found if isinstance(found, torch.dtype) else None


def forget_packing(made: Any) -> None:
    """Let a model of transformers whose weights were packed say that they aren't, so that it is
    saved and loaded as a dense one. Its configs have to be its own.
    """
    if not getattr(made, "is_quantized", False):
        return
    for name in _ON_THE_MODEL:
        made.__dict__.pop(name, None)
    made.is_quantized = False
    for module in made.modules():
        config = getattr(module, "config", None)
        for name in _ON_ITS_CONFIGS if hasattr(config, "__dict__") else ():
            config.__dict__.pop(name, None)
