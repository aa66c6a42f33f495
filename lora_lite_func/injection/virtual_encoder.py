"""Virtual tokens in front of what an encoder-decoder model encodes.

The model's call and `get_encoder()`, which `generate` calls alone, put them there alike; a call
that is given what was encoded has only a mask to lengthen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.torch_internals import paired
from ..layers.signatures import arguments_of
from ..layers.whole_calls import token_table
from .attachment import Attachment
from .references import shallow_copy
from .virtual_arguments import Given, batch_of, in_front, mask_given
from .virtual_values import front_of, values_of

__all__ = ["encoded", "encoder_with_front"]

_ENCODED, _MASK = "encoder_outputs", "attention_mask"
_OF_ENCODER = ("input_ids", "inputs_embeds", _MASK, "output_attentions", "output_hidden_states")


def encoded(attachments: Sequence[Attachment], module: Any, given: Given) -> Given:
    """The arguments of an encoder-decoder model's call with its tokens encoded, virtual ones in
    front.

    Args:
        attachments: the adapters with virtual tokens, innermost first.
        module: the model.
        given: the call's arguments.

    Raises:
        UnsupportedError: `encoder_outputs` hasn't the virtual tokens.
    """
    path = attachments[-1].site.path
    slots = sum(attachment.site.r for attachment in attachments)
    mask = mask_given(given, path)
    states = given.get(_ENCODED)
    if states is None:
        rows, tokens, device = batch_of(given, path)
        encoder = module.get_encoder()
        own = {k: v for k, v in given.items() if k in _OF_ENCODER and v is not None}
        given = {k: v for k, v in given.items() if k != "inputs_embeds"}
        given[_ENCODED] = _encode(attachments, module, encoder, encoder, own)
    else:
        hidden: Tensor = states[0]
        rows, tokens, device = hidden.shape[0], hidden.shape[1] - slots, hidden.device
        if tokens < 1 or (mask is not None and mask.shape[1] != tokens):
            raise UnsupportedError(
                f"{path!r}: encoder_outputs {tuple(hidden.shape)} isn't of {slots} virtual tokens "
                f"and those of the attention_mask; take them from the adapted model's own "
                f"get_encoder()"
            )
    for attachment in reversed(attachments):
        front = front_of(attachment, module, rows)
        mask = front.mask(mask, rows, tokens, device)
        if mask is not None:
            mask = front.packed(mask).joined_mask(mask)
        tokens += front.slots
    return given if mask is None else {**given, _MASK: mask}


def encoder_with_front(attachments: Sequence[Attachment], module: Any, encoder: Any) -> Any:
    """A copy of a model's encoder whose call has virtual tokens in front of its own."""
    made = shallow_copy(encoder, type(encoder))

    @functools.wraps(encoder.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(paired(arguments_of(type(encoder)), args)), **kwargs}
        return _encode(attachments, module, encoder, encoder.forward, given)

    made.__dict__["forward"] = forward
    return made


def _encode(
    attachments: Sequence[Attachment],
    module: Any,
    encoder: Any,
    call: Callable[..., Any],
    given: Given,
) -> Any:
    """The encoder's result, with all of the virtual tokens in it."""
    names = arguments_of(type(encoder))
    embedder = module if token_table(encoder) is None else encoder
    for attachment in reversed(attachments):
        path = attachment.site.path
        rows = batch_of(given, path)[0]
        front = front_of(attachment, module, rows)
        values = values_of(attachment, module, rows)
        given, _ = in_front(front, values, embedder, given, names, False, path)
    return call(**given)
