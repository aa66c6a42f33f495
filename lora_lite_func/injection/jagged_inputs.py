"""Jagged inputs: sequences of different lengths in one tensor (N, *, d).

The tokens of all sequences lie one after another in its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.torch_internals import is_jagged
from .attachment import Attachment

__all__ = ["by_values"]


def by_values(
    x: Any, attachments: Sequence[Attachment], call: Callable[[Tensor], Tensor]
) -> Tensor:
    """A layer's output for a jagged x.

    It comes from a call on all tokens (T, ...), because the layer takes each token alone.

    Raises:
        UnsupportedError: x is nested in another way, or each sequence has an adapter of its own.
    """
    site = attachments[-1].site
    if not is_jagged(x):
        raise UnsupportedError(
            f"site {site.path!r}: expected a nested tensor of layout torch.jagged, contiguous, "
            f"with its lengths behind the first dimension, found layout {x.layout}; make it so "
            f"(torch.nested.nested_tensor(..., layout=torch.jagged)), or pad it"
        )
    if any(attachment.row_plan is not None for attachment in attachments):
        raise UnsupportedError(
            f"site {site.path!r}: a jagged input's tokens lie in a row, in which rows with "
            f"adapters of their own can't be told apart; pad it"
        )
    return torch.nested.nested_tensor_from_jagged(call(x.values()), x.offsets())
