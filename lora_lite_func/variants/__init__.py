"""The table of methods, one file each.

A new method is a file here and a row below; a user's own is registered by `ll.register`.
"""

from __future__ import annotations

from ..core.method import Variant, register, variants
from . import (
    adalora,
    antipasto,
    asvd,
    bdlora,
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
    glora,
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
    lori,
    mica,
    milora,
    miss,
    mora,
    oft,
    olora,
    osf,
    peanut,
    pissa,
    psoft,
    qalora,
    randlora,
    reft,
    road,
    s_steer,
    shira,
    ssvd,
    tokens,
    vera,
    waveft,
)
from .adalora import AdaLoRAConfig
from .antipasto import AntiPaSTOConfig
from .asvd import ASVDConfig
from .bdlora import BDLoRAConfig
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
from .glora import GLoRAConfig
from .gralora import GraLoRAConfig
from .hira import HiRAConfig
from .hra import HRAConfig
from .ia3 import IA3Config, IA3FFConfig
from .kasa import KaSAConfig
from .ln_tuning import LNTuningConfig
from .loha import ABBAConfig, LoHaConfig
from .lokr import LoKrConfig
from .lora import LoRAConfig
from .lora_ga import LoRAGAConfig
from .lora_xs import LoRAXSConfig, TinyLoRAConfig
from .lori import LoRIConfig
from .mica import MiCAConfig
from .milora import MiLoRAConfig
from .miss import MiSSConfig
from .mora import MoRAConfig
from .oft import OFTConfig
from .olora import OLoRAConfig
from .osf import OSFConfig
from .peanut import PEANuTConfig
from .pissa import PiSSAConfig
from .psoft import PSOFTConfig
from .qalora import QALoRAConfig
from .randlora import RandLoRAConfig
from .reft import DiReFTConfig, LoReFTConfig
from .road import ROADConfig
from .s_steer import SSteerConfig
from .shira import SHiRAConfig
from .ssvd import SSVDConfig
from .tokens import TokensConfig
from .vera import VeRAConfig
from .waveft import WaveFTConfig

__all__ = [
    "TABLE",
    "ABBAConfig",
    "ASVDConfig",
    "AdaLoRAConfig",
    "AntiPaSTOConfig",
    "BDLoRAConfig",
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
    "GLoRAConfig",
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
    "LoRIConfig",
    "LoReFTConfig",
    "MiCAConfig",
    "MiLoRAConfig",
    "MiSSConfig",
    "MoRAConfig",
    "OFTConfig",
    "OLoRAConfig",
    "OSFConfig",
    "PEANuTConfig",
    "PSOFTConfig",
    "PiSSAConfig",
    "QALoRAConfig",
    "ROADConfig",
    "RandLoRAConfig",
    "SHiRAConfig",
    "SSVDConfig",
    "SSteerConfig",
    "TinyLoRAConfig",
    "TokensConfig",
    "VeRAConfig",
    "WaveFTConfig",
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
    psoft.VARIANT,
    peanut.VARIANT,
    waveft.VARIANT,
    glora.VARIANT,
    bdlora.VARIANT,
    qalora.VARIANT,
    mora.VARIANT,
    loha.VARIANT_ABBA,
    lori.VARIANT,
    osf.VARIANT,
)

for _variant in TABLE:
    register(_variant)
