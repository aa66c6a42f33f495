"""A layer's index and its role in the residual stream, by its path and its shape."""

from __future__ import annotations

from torch import nn

from .kinds import KINDS

__all__ = ["layer_index", "residual_width", "role_of"]


_WRITERS = (
    ".o",
    ".o_proj",
    ".out_proj",
    ".attn.proj",
    ".down_proj",
    ".wo",
    ".output.dense",
)
"""Whole names at the end of a path."""


def layer_index(path: str) -> int | None:
    """The first number in a path: 3 for "model.layers.3.mlp.up_proj"; None where there is none."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def role_of(path: str, size: tuple[int, int] | None, width: int) -> str:
    """Reader, writer or inner: by shape (d_in, d_out) against the residual width, and by name where
    both sides have that width.
    """
    reads, writes = (n == width for n in size or (0, 0))
    if reads and writes:
        return "writer" if f".{path}".endswith(_WRITERS) else "reader"
    return "reader" if reads else "writer" if writes else "inner"


def residual_width(model: nn.Module) -> int:
    """The width of the residual stream: the model config's hidden size, else the commonest feature
    count of its linear layers.
    """
    config = getattr(model, "config", None)
    for holder in (config, getattr(config, "text_config", None)):
        for name in ("hidden_size", "d_model", "n_embd", "dim"):
            width = getattr(holder, name, None)
            if isinstance(width, int):
                return width
    linear = KINDS["linear"]
    sizes = [n for m in model.modules() if linear.holds(m) for n in linear.size(m) or ()]
    return max(sizes, key=lambda n: (sizes.count(n), n), default=0)
