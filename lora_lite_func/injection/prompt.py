"""Whole modules as sites: the hidden state in what they return, and which of its tokens belong to the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import StructureError, UnsupportedError

__all__ = ["Prompt", "Prompted", "install_prompt_hooks", "prompt_of", "prompted", "tokens_of"]


# --------------------------------------------------------------------------------------- the prompt
@dataclass(frozen=True, eq=False)
class Prompted:
    """Adapters, and which tokens of the batch are the prompt's: what `ll.prompted` makes and
    `ll.apply` takes.
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
    """What is known of a call's prompt: a mask (N, T), whether it was given for this very batch,
    whether a cache holds it already.
    """

    mask: Tensor | None = None
    given: bool = False
    cached: bool = False


def prompt_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Prompt:
    """By the attention mask (N, T) among a model's arguments: padding is no part of a prompt."""
    mask = kwargs.get("attention_mask")
    if mask is None and len(args) > 1:
        names = list(inspect.signature(model.forward).parameters)[: len(args)]
        mask = dict(zip(names, args, strict=False)).get("attention_mask")
    caches = (
        v
        for name, v in kwargs.items()
        if name == "past_key_values" or hasattr(type(v), "get_seq_length")
    )
    return Prompt(
        mask if isinstance(mask, Tensor) and mask.ndim == 2 else None,
        cached=any(map(_holds_tokens, caches)),
    )


def _holds_tokens(cache: Any) -> bool:
    """Whether a model's key-value cache goes on from earlier tokens: an object of transformers, or
    a sequence of pairs.
    """
    length = getattr(cache, "get_seq_length", None)
    return bool(length() > 0) if callable(length) else bool(cache)


def tokens_of(h: Tensor, prompt: Prompt | None, path: str) -> Tensor:
    """Which tokens of h (..., T, d) belong to the prompt: (..., T) bool.

    Without a mask all do. In a call that goes on from a cache none do, which an attention mask of
    other length says, too.

    Args:
        h: the hidden state.
        prompt: what is known of it; None in a bound model, whose running call says it.
        path: of the site, for messages.

    Raises:
        UnsupportedError: a mask that was given doesn't fit the hidden state.
    """
    mask, given, cached = prompt or _told() or Prompt()
    shape = h.shape[:-1] if h.ndim > 1 else torch.Size([1])
    if cached:
        return h.new_zeros(shape, dtype=torch.bool)
    if mask is None:
        return h.new_ones(shape, dtype=torch.bool)
    if mask.shape == shape:
        return mask.to(h.device) != 0
    if given:
        raise UnsupportedError(
            f"{path!r}: the prompt's mask is {tuple(mask.shape)}, the hidden state here has "
            f"tokens {tuple(shape)}; "
            "this module's tokens aren't the prompt's, name another"
        )
    return (
        h.new_zeros(shape, dtype=torch.bool)
        if len(shape) == 2
        else h.new_ones(shape, dtype=torch.bool)
    )


_TOLD: ContextVar[Prompt | None] = ContextVar("lora_lite_func_prompt", default=None)
_TRACED: list[Prompt | None] = [None]
"""What is told while torch.compile or torch.export traces a call, one at a time: neither knows
context variables.
"""


def _told() -> Prompt | None:
    return _TRACED[0] if torch.compiler.is_dynamo_compiling() else _TOLD.get() or _TRACED[0]


def _say(prompt: Prompt | None) -> None:
    if torch.compiler.is_dynamo_compiling():
        _TRACED[0] = prompt
    else:
        _TOLD.set(prompt)


def install_prompt_hooks(bound: nn.Module) -> None:
    """Let a bound model's calls tell its sites what is known of the prompt, call by call and thread
    by thread.
    """
    if _start not in bound._forward_pre_hooks.values():
        bound.register_forward_pre_hook(_start, with_kwargs=True)
        bound.register_forward_hook(_end, always_call=True)


def _start(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    _say(prompt_of(module, args, kwargs))


def _end(module: nn.Module, args: Any, output: Any) -> None:
    _say(None)
