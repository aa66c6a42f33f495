"""PEFT's trainable tokens: replaced rows of embeddings, and nothing else."""

from __future__ import annotations

from typing import Any

from ..codec import Codec, Written

__all__ = ["TOKENS"]


def _nothing(*_: Any) -> Any:
    """Read or write nothing: replaced rows stand beside a method's tensors in any file, and this
    method has no other tensors.
    """
    return Written({}, {})


TOKENS = Codec(
    peft_type="TRAINABLE_TOKENS",
    configs=(),
    suffixes=(),
    understood="token_indices",
    read=_nothing,
    write=_nothing,
    token_prefix="",
    keeps_modules=False,
)
