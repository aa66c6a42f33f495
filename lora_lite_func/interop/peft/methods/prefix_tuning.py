"""PEFT's prefix tuning and Cartridge: keys and values of virtual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError
from ....layers.key_cache import heads_of
from ....layers.whole_calls import has_encoder
from ....variants import CartridgeConfig, PrefixTuningConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from ..whole_model import only_one, said_of_model
from .prompt_tuning import ABOUT_MODEL, TENSOR

__all__ = ["CARTRIDGE", "PREFIX_TUNING"]


def _prefix(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> Tensor:
    """Return prompt_embeddings (P, layers * 2 * w) as (layers, 2, P, w).

    Of a model that encodes and decodes, layer i has the keys and values that the file has for layer
    2 i, as PEFT counts a second attention beside each of the decoder's.

    Raises:
        CheckpointError: the tensor is of another model.
    """
    rows, site = held[TENSOR], entry.known("keys and values are those of its layers")
    layers, width = site.d_in, site.d_out
    count = reader.whole("num_virtual_tokens", rows.shape[0])
    if tuple(rows.shape) != (count, layers * 2 * width):
        raise CheckpointError(
            f"{reader.where}: {TENSOR}: expected {count} rows for {layers} layers with keys of "
            f"{width}, ({count}, {layers * 2 * width}), found {tuple(rows.shape)}"
        )
    made = rows.view(count, layers, 2, width).permute(1, 2, 0, 3)
    if has_encoder(entry.module):
        made = made[[2 * i % layers for i in range(layers)]]
    return made.contiguous()


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read a prefix. What made it in training isn't in the file."""
    made = _prefix(reader, entry, held)
    return [Part(PrefixTuningConfig, {"lora_prefix": made}, r=made.shape[2])]


def read_cartridge(
    reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]
) -> list[Part]:
    """Read a prefix whose first tokens are frozen."""
    made, frozen = _prefix(reader, entry, held), reader.whole("num_frozen_tokens", 1, 0)
    leaves = {"lora_prefix": made[:, :, frozen:]}
    leaves |= {"lora_sink": made[:, :, :frozen]} if frozen else {}
    return [Part(CartridgeConfig, leaves, {"frozen": frozen}, made.shape[2])]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write what the method makes, keys before values in each layer.

    Raises:
        CheckpointError: no model was given.
        UnsupportedError: PEFT has no one file for these adapters.
    """
    adapter, path = only_one(adapters, modules, "PREFIX_TUNING")
    model = modules.get(path)
    if model is None:
        raise CheckpointError(
            "to_peft: PEFT's prefixes say the heads of the model that they are for; give the base "
            "model"
        )
    cfg: Any = adapter.config
    virtual: Any = adapter.layout.variant.virtual
    made = virtual(cfg, adapter[path], adapter.sites[path]).detach()  # (layers, 2, P, w)
    heads = (heads_of(model) or (0, 0, 0))[1]
    fields = {
        "num_virtual_tokens": made.shape[2],
        "token_dim": made.shape[3],
        "num_attention_heads": heads,
    }
    fields |= {"num_frozen_tokens": cfg.frozen} if isinstance(cfg, CartridgeConfig) else {}
    fields |= said_of_model(modules, path) | {"num_layers": made.shape[0]}
    if has_encoder(model):
        made, fields["num_transformer_submodules"] = _of_decoder(made, type(model).__name__), 2
    return Written(fields, {path: {TENSOR: made.permute(2, 0, 1, 3).flatten(1)}})


def _of_decoder(made: Tensor, model: str) -> Tensor:
    """Return a decoder's prefix (layers, 2, P, w) as PEFT takes it, which gives layer i what the
    file has for layer 2 i. So with an even number of layers half of them are used, twice.

    Raises:
        UnsupportedError: two layers that would have one prefix there have unlike ones.
    """
    layers = made.shape[0]
    written = torch.zeros_like(made)
    for i in range(layers):
        j = 2 * i % layers
        again = layers % 2 == 0 and 2 * i >= layers
        if again and not written[j].equal(made[i]):
            raise UnsupportedError(
                f"to_peft: {model} encodes and decodes, and of such a model's prefix PEFT uses "
                f"every other layer's, twice: layers {i - layers // 2} and {i} would have one, and "
                f"theirs differ here; keep it in a file of the library's own (ll.save)"
            )
        written[j] = made[i]
    return written


PREFIX_TUNING = Codec(
    peft_type="PREFIX_TUNING",
    configs=(PrefixTuningConfig,),
    suffixes=(TENSOR,),
    understood=f"num_virtual_tokens {ABOUT_MODEL}",
    ignored="encoder_hidden_size prefix_projection",
    read=read,
    write=write,
    kinds="cache",
    of_whole_model=True,
)
CARTRIDGE = Codec(
    peft_type="CARTRIDGE",
    configs=(CartridgeConfig,),
    suffixes=(TENSOR,),
    understood=f"num_virtual_tokens num_frozen_tokens {ABOUT_MODEL}",
    read=read_cartridge,
    write=write,
    kinds="cache",
    of_whole_model=True,
)
