"""The table of PEFT's methods that can be read and written."""

from __future__ import annotations

from ..codec import Codec
from .adalora import ADALORA
from .adamss import ADAMSS
from .adaption_prompt import ADAPTION_PROMPT
from .beft import BEFT
from .boft import BOFT
from .c3a import C3A
from .cpt import CPT
from .deft import DEFT
from .delora import DELORA
from .fourierft import FOURIERFT
from .frod import FROD
from .glora import GLORA
from .gralora import GRALORA
from .hira import HIRA
from .hra import HRA
from .ia3 import IA3
from .lily import LILY
from .ln_tuning import LN_TUNING
from .loha import LOHA
from .lokr import LOKR
from .lora import LORA
from .miss import MISS
from .mpt import MPT
from .oft import OFT
from .osf import OSF
from .p_tuning import P_TUNING
from .peanut import PEANUT
from .poly import POLY
from .prefix_tuning import CARTRIDGE, PREFIX_TUNING
from .prompt_tuning import PROMPT_TUNING
from .psoft import PSOFT
from .pvera import PVERA
from .randlora import RANDLORA
from .road import ROAD
from .shira import SHIRA
from .supertuning import SUPERTUNING
from .tinylora import TINYLORA
from .tokens import TOKENS
from .unilora import UNILORA
from .vblora import VBLORA
from .vera import VERA
from .waveft import WAVEFT

__all__ = ["LORA", "METHODS", "TOKENS"]

METHODS: dict[str, Codec] = {
    codec.peft_type: codec
    for codec in (
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
        DEFT,
        TINYLORA,
        SUPERTUNING,
        PSOFT,
        PEANUT,
        WAVEFT,
        GLORA,
        OSF,
        POLY,
        PROMPT_TUNING,
        LILY,
        VBLORA,
        P_TUNING,
        PREFIX_TUNING,
        CARTRIDGE,
        MPT,
        CPT,
        UNILORA,
        PVERA,
        ADAMSS,
        FROD,
        ADAPTION_PROMPT,
        BEFT,
        LN_TUNING,
        TOKENS,
    )
}
