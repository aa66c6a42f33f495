"""Which kind of layer a module is, and its sizes, read without a call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .embedding import defers
from .norms import normalises
from .weights import is_linear_like, is_size, stored

__all__ = [
    "conv_size",
    "embedding_size",
    "is_conv",
    "is_embedding",
    "is_linear",
    "is_module",
    "is_norm",
    "is_transposed_conv",
    "is_transposed_linear",
    "linear_size",
    "looks_up_itself",
    "norm_size",
]


def is_transposed_linear(module: Any) -> bool:
    """Whether it is transformers' Conv1D, which has nx and nf but no in_features."""
    # asked first, since a module's own look-up of what it hasn't costs more than all else here
    if "nf" not in getattr(module, "__dict__", ()) and not hasattr(type(module), "nf"):
        return False
    nf, nx = getattr(module, "nf", None), getattr(module, "nx", None)
    if not is_size(nf) or not is_size(nx):
        return False
    weight = stored(module, "weight")
    return isinstance(weight, Tensor) and tuple(weight.shape) == (nx, nf)


def is_linear(module: Any) -> bool:
    """Whether a module acts as a linear layer."""
    return is_linear_like(module) or is_transposed_linear(module)


def linear_size(module: Any) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer; None for any other module."""
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if d_in is None or d_out is None:
        d_in, d_out = getattr(module, "nx", None), getattr(module, "nf", None)
    return None if d_in is None or d_out is None else (int(d_in), int(d_out))


def is_conv(module: Any) -> bool:
    """Whether a module is a convolution with one weight of its own."""
    if not hasattr(module, "kernel_size"):
        return False  # checked first, since a whole model may warn when it is asked for channels
    channels, weight = getattr(module, "out_channels", None), stored(module, "weight")
    if not is_size(channels) or not isinstance(weight, Tensor):
        return False
    if isinstance(weight, nn.UninitializedParameter) or weight.ndim < 2:
        return False
    return channels == (
        weight.shape[1] * getattr(module, "groups", 1)
        if is_transposed_conv(module)
        else weight.shape[0]
    )


def is_transposed_conv(module: Any) -> bool:
    """Whether a convolution is a transposed one."""
    return getattr(module, "transposed", False) is True


def conv_size(module: Any) -> tuple[int, int] | None:
    """(d_in, d_out) of a convolution's weight as a matrix; None for any other module."""
    return (
        (int(stored(module, "weight").numel() // module.out_channels), int(module.out_channels))
        if is_conv(module)
        else None
    )


def is_embedding(module: Any) -> bool:
    """Whether a module is a table that ids are looked up in."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and isinstance(
        stored(module, "weight"), Tensor
    )


def embedding_size(module: Any) -> tuple[int, int] | None:
    """(ids, features) of a table; None for any other module."""
    if not is_embedding(module):
        return None
    return int(module.num_embeddings), int(module.embedding_dim)


def looks_up_itself(module: Any) -> bool:
    """Whether a table's class looks ids up in a way of its own."""
    return not defers(getattr(type(module), "_ll_base", type(module)))


def norm_size(module: Any) -> tuple[int, int] | None:
    """(1, features) of a norm with a weight; None without one."""
    weight = stored(module, "weight")
    return (1, weight.numel()) if isinstance(weight, Tensor) else None


def is_norm(module: Any) -> bool:
    """Whether a module normalises its input."""
    return isinstance(module, nn.Module) and normalises(module)


def is_module(module: Any) -> bool:
    """Whether it is a module at all."""
    return isinstance(module, nn.Module)
