"""PEFT's P-tuning, of which its files hold what the network made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....core.adapter import Adapter
from ....variants import PTuningConfig
from ....variants.p_tuning import virtual
from ..codec import Codec, Written
from ..whole_model import only_one
from .prompt_tuning import ABOUT_MODEL, TENSOR, read, written

__all__ = ["P_TUNING"]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write what the network makes of its tokens.

    Raises:
        UnsupportedError: PEFT has no one file for these adapters.
    """
    adapter, path = only_one(adapters, modules, "P_TUNING")
    cfg: Any = adapter.config
    tokens = virtual(cfg, adapter[path], adapter.sites[path]).detach()
    fields = {
        "encoder_reparameterization_type": cfg.encoder.upper(),
        "encoder_hidden_size": cfg.hidden or tokens.shape[1],
    }
    if cfg.encoder == "lstm":
        fields["encoder_num_layers"] = cfg.lstm_layers
    return written(tokens, path, modules, fields)


P_TUNING = Codec(
    peft_type="P_TUNING",
    configs=(PTuningConfig,),
    suffixes=(TENSOR,),
    understood=f"num_virtual_tokens {ABOUT_MODEL}",
    ignored="encoder_reparameterization_type encoder_hidden_size encoder_num_layers "
    "encoder_dropout",
    read=read,
    write=write,
    kinds="call",
    of_whole_model=True,
)
