"""Models whose attention can be given keys and values of tokens that it hasn't seen."""

from __future__ import annotations

from typing import Any

from ..core.errors import UnsupportedError
from .whole_calls import has_cache, has_encoder, is_causal

__all__ = ["cache_size", "heads_of", "takes_cache"]


def takes_cache(module: Any) -> bool:
    """Whether a model's attention can be given keys and values of tokens that it hasn't seen."""
    if not has_cache(module):
        return False
    return (has_encoder(module) or is_causal(module)) and heads_of(module) is not None


def cache_size(module: Any) -> tuple[int, int] | None:
    """(layers, width of a layer's keys) of a model's cache; None for a module without one."""
    if not takes_cache(module):
        return None
    layers, heads, size = heads_of(module) or (0, 0, 0)
    return layers, heads * size


def heads_of(module: Any) -> tuple[int, int, int] | None:
    """(layers, heads, size of a head) of the keys in a model's cache; None where its config doesn't
    say them.

    Raises:
        UnsupportedError: layers that share keys, or have keys of unlike shapes.
    """
    config: Any = getattr(module, "config", None)
    if not callable(getattr(config, "get_text_config", None)):
        return None
    config = config.get_text_config(decoder=True)
    layers = _said(config, "num_decoder_layers", "num_hidden_layers")
    heads = _said(config, "num_key_value_heads", "num_attention_heads")
    if not isinstance(layers, int) or not isinstance(heads, int):
        return None
    for name in ("num_kv_shared_layers", "kv_lora_rank", "num_global_key_value_heads"):
        if getattr(config, name, None):
            raise UnsupportedError(
                f"{type(module).__name__}: its config has {name}={getattr(config, name)}, so that "
                f"not all of its layers have keys of one shape of their own; take virtual tokens "
                f"(ll.PromptTuningConfig)"
            )
    kinds = getattr(config, "layer_types", None) or ()
    for kind in kinds:
        if not str(kind).endswith("attention") or str(kind).startswith("linear"):
            raise UnsupportedError(
                f"{type(module).__name__}: it has layers of type {kind!r}, which keep no keys; "
                f"take virtual tokens (ll.PromptTuningConfig)"
            )
    size = _said(config, "head_dim")
    return layers, heads, size or config.hidden_size // config.num_attention_heads


def _said(config: Any, *names: str) -> Any:
    """The first of these that a config says."""
    for name in names:
        if getattr(config, name, None):
            return getattr(config, name)
    return None
