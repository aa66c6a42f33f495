"""The table of PEFT's methods that can be read and written."""

from __future__ import annotations

from .gates import BEFT, BOFT, HRA, IA3, LN_TUNING, OFT, ROAD
from .lora import LORA
from .method import Method
from .seeded import FOURIERFT, RANDLORA, SHIRA, VERA
from .updates import ADALORA, C3A, DELORA, GRALORA, HIRA, LOHA, LOKR, MISS

__all__ = ["METHODS"]

METHODS: dict[str, Method] = {
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
    )
}
