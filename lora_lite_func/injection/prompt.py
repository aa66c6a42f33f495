"""Which tokens of a hidden state belong to the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import StructureError, UnsupportedError

__all__ = ["Prompt", "Prompted", "prompted", "tokens_of"]


# --------------------------------------------------------------------------------------- the prompt
@dataclass(frozen=True, eq=False)
class Prompted:
    """Adapters with a mask that says which tokens of the batch belong to the prompt.

    `ll.prompted` makes it, and `ll.apply` takes it.
    """

    params: Any
    mask: Tensor


def prompted(params: Any, mask: Tensor) -> Prompted:
    """Adapters with the tokens that belong to the prompt, for methods that edit some of those
    (LoReFT, DiReFT).

    `ll.apply(model, ll.prompted(params, mask), input_ids)`. Without it the prompt is what the
    model's own `attention_mask` leaves, or every token; in training on prompts and responses
    together, give the prompt's. `generate` on a bound model needs none.

    Args:
        params: an Adapter, or several, as `ll.apply` takes them.
        mask: (N, T), nonzero where a token belongs to the prompt, shaped like the hidden states'
            tokens.

    Raises:
        StructureError: the mask isn't a tensor.
    """
    if not isinstance(mask, Tensor):
        raise StructureError(f"prompted: expected a mask (N, T), found {type(mask).__name__}")
    return Prompted(params, mask)


class Prompt(NamedTuple):
    """What is known of a call's prompt.

    Attributes:
        mask: (N, T), nonzero where a token belongs to the prompt; None where all tokens do.
        given: whether the mask was given for this very batch, by `prompted`.
        cached: whether a cache holds the prompt already.
        may_go_on: whether a cache was given of which it isn't known whether it holds tokens.
    """

    mask: Tensor | None = None
    given: bool = False
    cached: bool = False
    may_go_on: bool = False


def tokens_of(h: Tensor, prompt: Prompt | None, path: str) -> Tensor:
    """Which tokens of h (..., T, d) belong to the prompt: (..., T) bool.

    Without a mask all tokens do. In a call that goes on from a cache none do; an attention mask of
    more tokens also shows such a call.

    Args:
        h: the hidden state.
        prompt: what is known of the prompt; None where the site wasn't called within its model's
            call.
        path: the path of the site, for messages.

    Raises:
        UnsupportedError: nothing is known, or the mask doesn't fit the hidden state.
    """
    if prompt is None:
        raise UnsupportedError(
            f"{path!r}: it is called outside of a call of the model that it was bound in, so which "
            "tokens are the prompt's isn't known; call the model, or bind this module by itself"
        )
    shape = h.shape[:-1] if h.ndim > 1 else torch.Size([1])
    mask = prompt.mask
    if prompt.cached:
        return h.new_zeros(shape, dtype=torch.bool)
    if mask is None:
        return h.new_ones(shape, dtype=torch.bool)
    if mask.shape == shape:
        return mask.to(h.device) != 0
    goes_on = prompt.may_go_on and len(shape) == 2 and shape[0] == mask.shape[0]
    if goes_on and shape[1] < mask.shape[1]:
        return h.new_zeros(shape, dtype=torch.bool)
    whose = "prompt's mask" if prompt.given else "attention mask"
    raise UnsupportedError(
        f"{path!r}: the {whose} is {tuple(mask.shape)}, the hidden state here has tokens "
        f"{tuple(shape)}; this module's tokens aren't the prompt's, name another, or give a mask "
        "of these tokens: ll.apply(model, ll.prompted(params, mask), ...)"
    )
