"""A model's key-value cache: how many tokens it holds, its room, and virtual ones put into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..core.errors import UnsupportedError
from ..core.torch_internals import first_of
from ..layers.key_cache import heads_of
from ..layers.whole_calls import CACHES, given_cache, has_encoder
from .attachment import Attachment
from .virtual_values import front_of, values_of

__all__ = ["cached_tokens", "check_room", "fill", "is_relative", "new_cache"]


def cached_tokens(given: Mapping[str, Any]) -> int:
    """How many tokens the cache of a call holds; 0 where it has none. Of a state that doesn't count
    them it is 1 where it isn't empty.
    """
    cache = given_cache(given)[1]
    length = getattr(cache, "get_seq_length", None)
    if callable(length):
        try:
            return int(length())
        except ValueError:  # a cache of linear attention alone
            return int(bool(cache.has_previous_state()))
    if isinstance(cache, (tuple, list)) and cache:
        return int(cache[0][0].shape[-2])
    return 0


def check_room(given: Mapping[str, Any], tokens: int, slots: int, path: str) -> None:
    """Refuse a cache of fixed size that is too short for the virtual tokens too.

    Args:
        given: the call's arguments.
        tokens: how many it is to hold after the call.
        slots: how many of those are virtual.
        path: of the site, for the message.

    Raises:
        UnsupportedError: it is.
    """
    cache = given_cache(given)[1]
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    fixed = (layer for layer in layers if not getattr(layer, "is_sliding", False))
    room = first_of((n for n in (getattr(x, "max_cache_len", 0) for x in fixed) if n), None)
    if room is not None and tokens > room:
        raise UnsupportedError(
            f"{path!r}: the cache has room for {room} tokens, and with {slots} virtual ones this "
            f"call needs {tokens}; make it longer by those (StaticCache(config, max_cache_len="
            f"{room + slots}), generate(max_cache_len=...)), or take a dynamic one"
        )


def new_cache(module: Any, given: dict[str, Any], names: Any) -> dict[str, Any]:
    """The arguments with an empty cache, where they had none."""
    if given_cache(given)[1] is not None:
        return given
    from transformers import DynamicCache, EncoderDecoderCache

    config = module.config.get_text_config(decoder=True)
    cache: Any = DynamicCache(config=config)
    if has_encoder(module):
        cache = EncoderDecoderCache(cache, DynamicCache(config=config))
    name = next(name for name in CACHES if name in names)
    return {**given, name: cache}


def fill(attachment: Attachment, module: Any, given: Mapping[str, Any], rows: int) -> None:
    """Put an adapter's virtual keys and values into the cache of a call that begins.

    Raises:
        UnsupportedError: gradient checkpointing is on, which takes caches away; or rows have unlike
            numbers of them, and the model counts the unused ones.
    """
    front = front_of(attachment, module, rows)
    if front.lengths is not None and has_encoder(module) and not is_relative(module):
        raise UnsupportedError(
            f"{attachment.site.path!r}: {type(module).__name__} numbers its decoder's tokens by "
            f"what the cache holds, so rows can't have unlike numbers of virtual keys; call it "
            f"once per adapter"
        )
    if module.training and torch.is_grad_enabled() and _is_checkpointed(module):
        raise UnsupportedError(
            f"{attachment.site.path!r}: {attachment.variant.name} gives its keys and values in a "
            f"cache, which gradient checkpointing takes away; turn that off "
            f"(model.gradient_checkpointing_disable())"
        )
    cache = given_cache(given)[1]
    cache = getattr(cache, "self_attention_cache", cache)
    layers, heads, size = heads_of(module) or (0, 0, 0)
    values = values_of(attachment, module, rows)  # (N, layers, 2, P, width)
    values = front.aligned(values, 3).to(module.dtype)
    values = values.unflatten(-1, (heads, size)).transpose(3, 4)  # (N, layers, 2, heads, P, size)
    for i in range(layers):
        cache.update(values[:, i, 0], values[:, i, 1], i)


def _is_checkpointed(module: Any) -> bool:
    return any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


def is_relative(module: Any) -> bool:
    """Whether a model's tokens know their distances alone."""
    return getattr(module.config, "relative_attention_num_buckets", None) is not None
