"""The table of methods, one file each, imported when one is first asked for.

A new method is a file here, a row of METHODS and an import for type checkers; a user's own is
registered by `ll.register`.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from ..core.method import Variant
from ..core.pinning import pin
from ..core.registry import register, register_later, variants

if TYPE_CHECKING:  # a type checker has these imports, and finds a misspelt name
    from .adalora import AdaLoRAConfig
    from .adamss import AdaMSSConfig
    from .antipasto import AntiPaSTOConfig
    from .arrow import ArrowConfig
    from .asvd import ASVDConfig
    from .bdlora import BDLoRAConfig
    from .bitfit import BitFitConfig
    from .boft import BOFTConfig
    from .c3a import C3AConfig
    from .cartridge import CartridgeConfig
    from .corda import CorDAConfig
    from .cpt import CPTConfig
    from .deft import DEFTConfig
    from .delora import DeLoRAConfig
    from .dora import DoRAConfig
    from .eva import EVAConfig
    from .fourierft import FourierFTConfig
    from .frod import FRoDConfig
    from .full import FullConfig
    from .glora import GLoRAConfig
    from .gralora import GraLoRAConfig
    from .hira import HiRAConfig
    from .hra import HRAConfig
    from .ia3 import IA3Config, IA3FFConfig
    from .kasa import KaSAConfig
    from .lily import LilyConfig
    from .llama_adapter import LLaMAAdapterConfig
    from .ln_tuning import LNTuningConfig
    from .loftq import LoftQConfig
    from .loha import ABBAConfig, LoHaConfig
    from .lokr import LoKrConfig
    from .lora import LoRAConfig
    from .lora_ga import LoRAGAConfig
    from .lora_xs import LoRAXSConfig, TinyLoRAConfig
    from .lori import LoRIConfig
    from .mica import MiCAConfig
    from .milora import MiLoRAConfig
    from .miss import MiSSConfig
    from .moelora import MoELoRAConfig
    from .monteclora import MonteCLoRAConfig
    from .mora import MoRAConfig
    from .mpt import MPTConfig
    from .oft import OFTConfig
    from .olora import OLoRAConfig
    from .osf import OSFConfig
    from .p_tuning import PTuningConfig
    from .peanut import PEANuTConfig
    from .pissa import PiSSAConfig
    from .poly import PolyConfig
    from .prefix_tuning import PrefixTuningConfig
    from .prompt_tuning import PromptTuningConfig
    from .psoft import PSOFTConfig
    from .pvera import PVeRAConfig
    from .qalora import QALoRAConfig
    from .randlora import RandLoRAConfig
    from .rasa import RaSAConfig
    from .reft import DiReFTConfig, LoReFTConfig
    from .road import ROADConfig
    from .s_steer import SSteerConfig
    from .shira import SHiRAConfig
    from .ssvd import SSVDConfig
    from .tokens import TokensConfig
    from .unilora import UniLoRAConfig
    from .vblora import VBLoRAConfig
    from .velora import VeLoRAConfig
    from .vera import VeRAConfig
    from .waveft import WaveFTConfig

__all__ = [
    "METHODS",
    "ABBAConfig",
    "ASVDConfig",
    "AdaLoRAConfig",
    "AdaMSSConfig",
    "AntiPaSTOConfig",
    "ArrowConfig",
    "BDLoRAConfig",
    "BOFTConfig",
    "BitFitConfig",
    "C3AConfig",
    "CPTConfig",
    "CartridgeConfig",
    "CorDAConfig",
    "DEFTConfig",
    "DeLoRAConfig",
    "DiReFTConfig",
    "DoRAConfig",
    "EVAConfig",
    "FRoDConfig",
    "FourierFTConfig",
    "FullConfig",
    "GLoRAConfig",
    "GraLoRAConfig",
    "HRAConfig",
    "HiRAConfig",
    "IA3Config",
    "IA3FFConfig",
    "KaSAConfig",
    "LLaMAAdapterConfig",
    "LNTuningConfig",
    "LilyConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoRAConfig",
    "LoRAGAConfig",
    "LoRAXSConfig",
    "LoRIConfig",
    "LoReFTConfig",
    "LoftQConfig",
    "MPTConfig",
    "MiCAConfig",
    "MiLoRAConfig",
    "MiSSConfig",
    "MoELoRAConfig",
    "MoRAConfig",
    "MonteCLoRAConfig",
    "OFTConfig",
    "OLoRAConfig",
    "OSFConfig",
    "PEANuTConfig",
    "PSOFTConfig",
    "PTuningConfig",
    "PVeRAConfig",
    "PiSSAConfig",
    "PolyConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "QALoRAConfig",
    "ROADConfig",
    "RaSAConfig",
    "RandLoRAConfig",
    "SHiRAConfig",
    "SSVDConfig",
    "SSteerConfig",
    "TinyLoRAConfig",
    "TokensConfig",
    "UniLoRAConfig",
    "VBLoRAConfig",
    "VeLoRAConfig",
    "VeRAConfig",
    "WaveFTConfig",
    "variants",
]

METHODS = {
    "abba": ("loha", "ABBAConfig"),
    "adalora": ("adalora", "AdaLoRAConfig"),
    "adamss": ("adamss", "AdaMSSConfig"),
    "antipasto": ("antipasto", "AntiPaSTOConfig"),
    "arrow": ("arrow", "ArrowConfig"),
    "asvd": ("asvd", "ASVDConfig"),
    "bdlora": ("bdlora", "BDLoRAConfig"),
    "bitfit": ("bitfit", "BitFitConfig"),
    "boft": ("boft", "BOFTConfig"),
    "c3a": ("c3a", "C3AConfig"),
    "cartridge": ("cartridge", "CartridgeConfig"),
    "corda": ("corda", "CorDAConfig"),
    "cpt": ("cpt", "CPTConfig"),
    "deft": ("deft", "DEFTConfig"),
    "delora": ("delora", "DeLoRAConfig"),
    "direft": ("reft", "DiReFTConfig"),
    "dora": ("dora", "DoRAConfig"),
    "eva": ("eva", "EVAConfig"),
    "fourierft": ("fourierft", "FourierFTConfig"),
    "frod": ("frod", "FRoDConfig"),
    "full": ("full", "FullConfig"),
    "glora": ("glora", "GLoRAConfig"),
    "gralora": ("gralora", "GraLoRAConfig"),
    "hira": ("hira", "HiRAConfig"),
    "hra": ("hra", "HRAConfig"),
    "ia3": ("ia3", "IA3Config"),
    "ia3_ff": ("ia3", "IA3FFConfig"),
    "kasa": ("kasa", "KaSAConfig"),
    "llama_adapter": ("llama_adapter", "LLaMAAdapterConfig"),
    "lily": ("lily", "LilyConfig"),
    "ln_tuning": ("ln_tuning", "LNTuningConfig"),
    "loha": ("loha", "LoHaConfig"),
    "lokr": ("lokr", "LoKrConfig"),
    "loftq": ("loftq", "LoftQConfig"),
    "lora": ("lora", "LoRAConfig"),
    "lora_ga": ("lora_ga", "LoRAGAConfig"),
    "lora_xs": ("lora_xs", "LoRAXSConfig"),
    "loreft": ("reft", "LoReFTConfig"),
    "lori": ("lori", "LoRIConfig"),
    "mica": ("mica", "MiCAConfig"),
    "milora": ("milora", "MiLoRAConfig"),
    "miss": ("miss", "MiSSConfig"),
    "moelora": ("moelora", "MoELoRAConfig"),
    "monteclora": ("monteclora", "MonteCLoRAConfig"),
    "mora": ("mora", "MoRAConfig"),
    "mpt": ("mpt", "MPTConfig"),
    "oft": ("oft", "OFTConfig"),
    "olora": ("olora", "OLoRAConfig"),
    "osf": ("osf", "OSFConfig"),
    "p_tuning": ("p_tuning", "PTuningConfig"),
    "peanut": ("peanut", "PEANuTConfig"),
    "pissa": ("pissa", "PiSSAConfig"),
    "poly": ("poly", "PolyConfig"),
    "prefix_tuning": ("prefix_tuning", "PrefixTuningConfig"),
    "prompt_tuning": ("prompt_tuning", "PromptTuningConfig"),
    "psoft": ("psoft", "PSOFTConfig"),
    "pvera": ("pvera", "PVeRAConfig"),
    "qalora": ("qalora", "QALoRAConfig"),
    "randlora": ("randlora", "RandLoRAConfig"),
    "rasa": ("rasa", "RaSAConfig"),
    "road": ("road", "ROADConfig"),
    "s_steer": ("s_steer", "SSteerConfig"),
    "shira": ("shira", "SHiRAConfig"),
    "ssvd": ("ssvd", "SSVDConfig"),
    "tinylora": ("lora_xs", "TinyLoRAConfig"),
    "tokens": ("tokens", "TokensConfig"),
    "unilora": ("unilora", "UniLoRAConfig"),
    "vblora": ("vblora", "VBLoRAConfig"),
    "velora": ("velora", "VeLoRAConfig"),
    "vera": ("vera", "VeRAConfig"),
    "waveft": ("waveft", "WaveFTConfig"),
}
"""{the method's name: (its file, its config class)}."""

_FILES = {config: file for file, config in METHODS.values()}


def _load(file: str) -> Any:
    """A file's module, whose methods are registered."""
    module = importlib.import_module(f".{file}", __name__)
    configs = [config for config, name in _FILES.items() if name == file]
    pin(configs, vars(module), __name__.rpartition(".")[0])
    for value in list(vars(module).values()):
        if isinstance(value, Variant):
            register(value)
    return module


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _FILES:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}",
                name=name,
                obj=sys.modules[__name__],
            )
        value = globals()[name] = getattr(_load(_FILES[name]), name)
        return value


for _name, (_file, _) in METHODS.items():
    register_later(_name, partial(_load, _file))
