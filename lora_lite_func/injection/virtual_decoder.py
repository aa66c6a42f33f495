"""Virtual tokens in front of what an encoder-decoder model decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core.errors import UnsupportedError
from ..layers.whole_calls import has_encoder, token_table
from .attachment import Attachment
from .virtual_arguments import Given, in_front
from .virtual_cache import is_relative
from .virtual_front import Front

__all__ = ["in_front_of_decoded", "of_decoder"]

_OWN = "decoder_"
_OF_TOKENS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_NAMES = tuple(_OWN + name for name in _OF_TOKENS)


def of_decoder(attachments: Sequence[Attachment], module: Any) -> list[Attachment]:
    """The adapters that have virtual tokens for what a model decodes, innermost first.

    Raises:
        UnsupportedError: one has, and the model decodes nothing.
    """
    found = [a for a in attachments if a.variant.decoder_tokens_of(a.cfg) is not None]
    if found and not has_encoder(module):
        raise UnsupportedError(
            f"{found[0].site.path!r}: {found[0].variant.name} has virtual tokens for a decoder, "
            f"and {type(module).__name__} doesn't encode and decode; make the adapter with "
            f"decoder=False"
        )
    return found


def in_front_of_decoded(
    front: Front, values: Tensor, module: Any, given: Given, path: str
) -> tuple[Given, Front]:
    """(the arguments with virtual tokens in front of those that are decoded, where they stand).

    Args:
        front: the virtual tokens' places.
        values: (N, P, width), those that a row uses first.
        module: the model.
        given: the call's arguments.
        path: of the site, for messages.

    Raises:
        UnsupportedError: rows have unlike numbers of them, and the model counts the unused ones;
            labels alone, of which the model doesn't say what it decodes for them; or an argument in
            which virtual tokens have no place.
    """
    if front.lengths is not None and not is_relative(module):
        raise UnsupportedError(
            f"{path!r}: {type(module).__name__} numbers its decoder's tokens by their places, so "
            f"rows can't have unlike numbers of virtual ones there; call it once per adapter"
        )
    own = {name: given.get(_OWN + name) for name in _OF_TOKENS} | {"labels": given.get("labels")}
    if own["input_ids"] is None and own["inputs_embeds"] is None:
        shifted = getattr(module, "prepare_decoder_input_ids_from_labels", None)
        if shifted is None:
            raise UnsupportedError(
                f"{path!r}: {type(module).__name__} doesn't say what it decodes for labels alone; "
                f"give decoder_input_ids too"
            )
        own["input_ids"] = shifted(given["labels"])
    own = {name: value for name, value in own.items() if value is not None}
    decoder = module.get_decoder()
    holder = module if token_table(decoder) is None else decoder
    made, front = in_front(front, values, holder, own, (), True, path)
    given = {k: v for k, v in given.items() if k not in (*_NAMES, "labels", "cache_position")}
    return given | {k if k == "labels" else _OWN + k: v for k, v in made.items()}, front
