"""The table of PEFT's methods that can be read and written."""

from __future__ import annotations

from typing import Any

from ..codec import Codec, Written
from .gates import BEFT, BOFT, HRA, IA3, LN_TUNING, OFT, ROAD
from .lora import LORA
from .seeded import FOURIERFT, RANDLORA, SHIRA, VERA
from .updates import ADALORA, C3A, DELORA, GRALORA, HIRA, LOHA, LOKR, MISS

__all__ = ["METHODS", "TOKENS"]


def _nothing(*_: Any) -> Any:
    """Replaced rows stand beside a method's tensors in any file; here there are no others."""
    return Written({}, {})


TOKENS = Codec("TRAINABLE_TOKENS", (), (), "token_indices", _nothing, _nothing)

METHODS: dict[str, Codec] = {
    m.peft_type: m
    for m in (
        LORA,
        ADALORA,
        LOHA,
        LOKR,
        HIRA,
        GRALORA,
        DELORA,
        MISS,
        C3A,
        IA3,
        ROAD,
        HRA,
        OFT,
        BOFT,
        VERA,
        RANDLORA,
        FOURIERFT,
        SHIRA,
        BEFT,
        LN_TUNING,
        TOKENS,
    )
}
