"""The table of methods, one file each.

A new method is a file here and a row below; a user's own is registered by `ll.register`.
"""

from __future__ import annotations

from ..core.method import Variant, register, variants
from . import (
    adalora,
    antipasto,
    asvd,
    bitfit,
    boft,
    c3a,
    corda,
    deft,
    delora,
    dora,
    eva,
    fourierft,
    full,
    gralora,
    hira,
    hra,
    ia3,
    kasa,
    ln_tuning,
    loha,
    lokr,
    lora,
    lora_ga,
    lora_xs,
    mica,
    milora,
    miss,
    oft,
    olora,
    pissa,
    randlora,
    reft,
    road,
    s_steer,
    shira,
    ssvd,
    tokens,
    vera,
)
from .adalora import AdaLoRAConfig
from .antipasto import AntiPaSTOConfig
from .asvd import ASVDConfig
from .bitfit import BitFitConfig
from .boft import BOFTConfig
from .c3a import C3AConfig
from .corda import CorDAConfig
from .deft import DEFTConfig
from .delora import DeLoRAConfig
from .dora import DoRAConfig
from .eva import EVAConfig
from .fourierft import FourierFTConfig
from .full import FullConfig
from .gralora import GraLoRAConfig
from .hira import HiRAConfig
from .hra import HRAConfig
from .ia3 import IA3Config, IA3FFConfig
from .kasa import KaSAConfig
from .ln_tuning import LNTuningConfig
from .loha import LoHaConfig
from .lokr import LoKrConfig
from .lora import LoRAConfig
from .lora_ga import LoRAGAConfig
from .lora_xs import LoRAXSConfig, TinyLoRAConfig
from .mica import MiCAConfig
from .milora import MiLoRAConfig
from .miss import MiSSConfig
from .oft import OFTConfig
from .olora import OLoRAConfig
from .pissa import PiSSAConfig
from .randlora import RandLoRAConfig
from .reft import DiReFTConfig, LoReFTConfig
from .road import ROADConfig
from .s_steer import SSteerConfig
from .shira import SHiRAConfig
from .ssvd import SSVDConfig
from .tokens import TokensConfig
from .vera import VeRAConfig

__all__ = [
    "TABLE",
    "ASVDConfig",
    "AdaLoRAConfig",
    "AntiPaSTOConfig",
    "BOFTConfig",
    "BitFitConfig",
    "C3AConfig",
    "CorDAConfig",
    "DEFTConfig",
    "DeLoRAConfig",
    "DiReFTConfig",
    "DoRAConfig",
    "EVAConfig",
    "FourierFTConfig",
    "FullConfig",
    "GraLoRAConfig",
    "HRAConfig",
    "HiRAConfig",
    "IA3Config",
    "IA3FFConfig",
    "KaSAConfig",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoRAConfig",
    "LoRAGAConfig",
    "LoRAXSConfig",
    "LoReFTConfig",
    "MiCAConfig",
    "MiLoRAConfig",
    "MiSSConfig",
    "OFTConfig",
    "OLoRAConfig",
    "PiSSAConfig",
    "ROADConfig",
    "RandLoRAConfig",
    "SHiRAConfig",
    "SSVDConfig",
    "SSteerConfig",
    "TinyLoRAConfig",
    "TokensConfig",
    "VeRAConfig",
    "variants",
]

TABLE: tuple[Variant, ...] = (
    lora.VARIANT,
    pissa.VARIANT,
    delora.VARIANT,
    ia3.VARIANT,
    ia3.VARIANT_FF,
    dora.VARIANT,
    hra.VARIANT,
    road.VARIANT,
    olora.VARIANT,
    loha.VARIANT,
    lokr.VARIANT,
    vera.VARIANT,
    oft.VARIANT,
    boft.VARIANT,
    adalora.VARIANT,
    bitfit.VARIANT,
    c3a.VARIANT,
    fourierft.VARIANT,
    miss.VARIANT,
    ssvd.VARIANT,
    s_steer.VARIANT,
    antipasto.VARIANT,
    randlora.VARIANT,
    gralora.VARIANT,
    shira.VARIANT,
    hira.VARIANT,
    eva.VARIANT,
    corda.VARIANT,
    asvd.VARIANT,
    lora_ga.VARIANT,
    ln_tuning.VARIANT,
    full.VARIANT,
    tokens.VARIANT,
    reft.VARIANT,
    reft.VARIANT_DIRECT,
    lora_xs.VARIANT,
    lora_xs.VARIANT_TINY,
    milora.VARIANT,
    mica.VARIANT,
    kasa.VARIANT,
    deft.VARIANT,
)

for _variant in TABLE:
    register(_variant)
