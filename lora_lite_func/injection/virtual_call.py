"""The whole call of a model with virtual tokens, or keys and values, in front of each row.

A call that doesn't go on from a cache is given the tokens in front of its own, embedded by the
copy's own table, with a mask, labels and positions that fit; its result has the caller's tokens
alone. A call that goes on from a cache, which holds the virtual tokens too, is given mask and
positions that count them. The cache's length tells which of the two it is. Keys and values are
put into the cache before the first tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..core.errors import UnsupportedError
from ..core.torch_internals import paired
from ..layers.kinds import KINDS
from ..layers.signatures import arguments_of
from ..layers.whole_calls import given_cache, has_encoder, is_causal
from .attachment import Attachment
from .call_result import own_tokens, without_cache
from .stand_in import on_stand_in
from .virtual_arguments import Given, batch_of, going_on, in_front
from .virtual_cache import cached_tokens, check_room, fill, new_cache
from .virtual_decoder import in_front_of_decoded, of_decoder
from .virtual_encoder import encoded, encoder_with_front
from .virtual_loss import check_weighted, weighted
from .virtual_values import (
    decoder_values_of,
    front_of,
    label_weights_of,
    labels_of,
    values_of,
)

__all__ = ["methods"]


def methods(cls: type[nn.Module]) -> dict[str, Any]:
    """What a site's class has in place of its model's own: the call, and what `generate` asks of
    the model besides it.
    """

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(paired(arguments_of(cls), args)), **kwargs}
        attachments = self._ll.attachments
        return on_stand_in(
            self, self._ll_base, lambda module, call: _begun(attachments, module, call, given)
        )

    made: dict[str, Any] = {"forward": forward}
    if hasattr(cls, "prepare_inputs_for_generation"):
        # `generate` would make the mask of a static cache before virtual tokens are counted
        made["create_masks_for_generate"] = staticmethod(lambda **given: given["attention_mask"])
    if hasattr(cls, "get_encoder") and "encoder_outputs" in arguments_of(cls):
        made["get_encoder"] = _get_encoder
    return made


def _get_encoder(self: Any, *args: Any, **kwargs: Any) -> Any:
    attachments = _parted(self._ll.attachments)[1]

    def with_front(module: Any, call: Any) -> Any:
        encoder = module.get_encoder(*args, **kwargs)
        return encoder_with_front(attachments, module, encoder) if attachments else encoder

    return on_stand_in(self, self._ll_base, with_front)


def _parted(
    attachments: Sequence[Attachment],
) -> tuple[list[Attachment], list[Attachment]]:
    """(the adapters with virtual keys and values, those with virtual tokens), innermost first.

    Raises:
        UnsupportedError: an adapter of the result's hidden state is there too.
    """
    for attachment in attachments:
        if not KINDS[attachment.site.kind].called:
            raise UnsupportedError(
                f"{attachment.site.path!r}: {attachment.variant.name} edits a hidden state in the "
                f"result of a call that another adapter changes as a whole; name blocks inside "
                f"(target_names)"
            )
    cached = [a for a in attachments if a.site.kind == "cache"]
    return cached, [a for a in attachments if a.site.kind != "cache"]


def _begun(
    attachments: Sequence[Attachment], module: Any, call: Callable[..., Any], given: Given
) -> Any:
    """The result of a call, once it is known whether it goes on from a cache."""
    for attachment in attachments:
        if attachment.variant.virtual is None:
            return _observed(attachments, module, call, given)
    cached, tokens = _parted(attachments)
    check_weighted(tokens, module, given)
    begins = cached_tokens(given) == 0
    names = arguments_of(type(module))
    has_cache = given_cache(given)[1] is not None
    decoded = of_decoder(tokens, module)
    if tokens and has_encoder(module):
        given, tokens = encoded(tokens, module, given), decoded
    if cached and begins:
        given = new_cache(module, given, names)
        rows = batch_of(given, cached[0].site.path, _decoded(module))[0]
        for attachment in cached:
            fill(attachment, module, given, rows)
    inside = (*cached, *tokens)
    result = _called(inside, len(inside), begins, module, call, given)
    if cached and not has_cache and not _asked("use_cache", module, given):
        return without_cache(result)
    return result


def _observed(
    attachments: Sequence[Attachment], module: Any, call: Callable[..., Any], given: Given
) -> Any:
    """The result of a call whose beginning and end are told to adapters without virtual tokens:
    what `ll.check` records with.
    """
    nothing = torch.empty(0)
    told = [a for a in attachments if a.variant.virtual is None]
    for a in told:
        if a.variant.inputs is not None:
            a.variant.inputs(a.cfg, a.p or {}, None, nothing, a.site)
    others = [a for a in attachments if a.variant.virtual is not None]
    result = _begun(others, module, call, given)
    for a in told:
        if a.variant.outputs is not None:
            a.variant.outputs(a.cfg, a.p or {}, None, nothing, nothing, a.site)
    return result


def _called(
    attachments: Sequence[Attachment],
    count: int,
    begins: bool,
    module: Any,
    call: Callable[..., Any],
    given: Given,
) -> Any:
    """The result of a call with the first `count` adapters in."""
    if count == 0:
        return call(**given)
    attachment, names = attachments[count - 1], arguments_of(type(module))
    path, slots, of = attachment.site.path, attachment.site.r, _decoded(module)
    rows, tokens, _ = batch_of(given, path, of)
    front, held = front_of(attachment, module, rows), cached_tokens(given)

    def inner(given: Given) -> Any:
        return _called(attachments, count - 1, begins, module, call, given)

    if not begins or attachment.site.kind == "cache":
        check_room(given, held + tokens, slots, path)
        under = sum(a.site.r for a in attachments[: count - 1])
        return inner(going_on(front, given, names, held - slots - under, path, of))
    check_room(given, held + slots + tokens, slots, path)
    if of:
        values = decoder_values_of(attachment, module, rows)
        given, front = in_front_of_decoded(front, values, module, given, path)
        # The members of a tuple don't say which of them are of the tokens that were encoded.
        result = own_tokens(inner(given | {"return_dict": True}), front, tokens)
        return result if _asked("return_dict", module, given) else result.to_tuple()
    values, labels = values_of(attachment, module, rows), labels_of(attachment, module, rows)
    given, front = in_front(front, values, module, given, names, is_causal(module), path, labels)
    result, weights = inner(given), label_weights_of(attachment, module, rows)
    if weights is not None and given.get("labels") is not None:
        result = weighted(result, front.aligned(weights, 1), given, path)
    return own_tokens(result, front, tokens)


def _decoded(module: Any) -> str:
    """What the arguments about tokens with a cache begin with."""
    return "decoder_" if has_encoder(module) else ""


def _asked(name: str, module: Any, given: Given) -> bool:
    """Whether a call has a setting on: as it was given, else as the model's config has it."""
    said = given.get(name)
    return bool(getattr(module.config, name, True) if said is None else said)
