"""A model's folder as transformers loads it, for folders whose names aren't the model's own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..core.errors import LoraLiteError
from ..interop.open import form_of
from ..interop.peft.folder import unpack
from ..io.checkpoint import load
from ..io.shards import PLAIN, Shards

__all__ = ["is_packed_folder", "known_class", "sizes_of", "weights_of", "whole_model"]


def whole_model(shards: Shards, adapter: str, why: LoraLiteError) -> nn.Module:
    """Load the model, in eval mode.

    Args:
        shards: the folder.
        adapter: what the model is for. It is tried on the model's sizes first, because loading
            takes long.
        why: the error of the model that the folder's names make.

    Raises:
        LoraLiteError: `why`, where transformers doesn't know the model, isn't installed, or can't
            load it; or the adapter can't be read, or doesn't fit.
    """
    kind = known_class(shards, why)
    sizes = sizes_of(shards, kind, why)
    _check_adapter(adapter, sizes)
    return weights_of(shards, kind, why)


def sizes_of(shards: Shards, kind: Any, why: LoraLiteError) -> nn.Module:
    """The folder's model as transformers makes it, without its weights.

    Raises:
        LoraLiteError: `why`, where transformers can't make it, or the folder holds less than it.
    """
    try:
        config = kind.config_class.from_pretrained(shards.folder, local_files_only=True)
        with torch.device("meta"):
            sizes: Any = kind(config)
            sizes.tie_weights()
    except Exception as error:  # transformers can raise anything on such a folder
        raise type(why)(f"{why} (transformers doesn't know it either: {error})") from None
    if not is_packed_folder(shards):
        _check_complete(shards, sizes, why)
    made: nn.Module = sizes
    return made


def weights_of(shards: Shards, kind: Any, why: LoraLiteError) -> nn.Module:
    """The folder's model as transformers loads it, in eval mode.

    Raises:
        LoraLiteError: `why`, where transformers can't load it, or misses weights.
    """
    if not is_packed_folder(shards) and any(dtype not in PLAIN for dtype in _weights(shards)):
        raise type(why)(
            f"{why} (config.json says no quantization_config, so transformers would leave out "
            f"the scales of packed weights)"
        ) from None
    try:
        loaded: Any = kind.from_pretrained(
            shards.folder,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise type(why)(f"{why} (transformers doesn't load it either: {error})") from None
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        raise type(why)(f"{why} (for transformers it lacks {missing[0]!r})") from None
    made: nn.Module = model.eval()
    return made


def _weights(shards: Shards) -> Iterable[str]:
    """Return the dtypes of a folder's weights, as safetensors says them."""
    return (dtype for name, (_, dtype) in shards.shapes.items() if name.endswith(".weight"))


def is_packed_folder(shards: Shards) -> bool:
    """Tell whether a folder's weights are packed, by its config."""
    return shards.config().get("quantization_config") is not None


def known_class(shards: Shards, why: LoraLiteError) -> Any:
    """Transformers' class for the folder, found by its config.

    Raises:
        LoraLiteError: `why`, where transformers doesn't know the model or isn't installed.
    """
    says = shards.config()
    named = says.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise why
    try:
        import transformers
    except ImportError:
        raise type(why)(
            f"{why} (with transformers installed it would be tried with its own names)"
        ) from None
    kind = getattr(transformers, named[0], None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise why
    return kind


def _check_complete(shards: Shards, sizes: nn.Module, why: LoraLiteError) -> None:
    """Refuse a folder that holds less than the model, because transformers would draw the rest at
    random.
    """
    needed = sum(p.numel() for p in sizes.parameters())
    held = sum(math.prod(shape) for shape, _ in shards.shapes.values())
    if needed > held:
        raise type(why)(
            f"{why} (for transformers it lacks weights: it has {held:,} numbers, "
            f"{type(sizes).__name__} {needed:,})"
        ) from None


def _check_adapter(adapter: str, sizes: nn.Module) -> None:
    form = form_of(adapter)
    if form == "peft":
        unpack(adapter, None)
    elif form == "ll":
        load(adapter, sizes)
