"""The table of methods, one file each. A new one is a file here and a row below; outsiders call `ll.register`."""

from __future__ import annotations

from ..spec import register, variants
from . import adalora, bitfit, boft, delora, dora, hra, ia3, loha, lokr, lora, oft, olora, pissa, road, vera
from .adalora import AdaLoRAConfig
from .bitfit import BitFitConfig
from .boft import BOFTConfig
from .delora import DeLoRAConfig
from .dora import DoRAConfig
from .hra import HRAConfig
from .ia3 import IA3Config, IA3FFConfig
from .loha import LoHaConfig
from .lokr import LoKrConfig
from .lora import LoRAConfig
from .oft import OFTConfig
from .olora import OLoRAConfig
from .pissa import PiSSAConfig
from .road import ROADConfig
from .vera import VeRAConfig

__all__ = [
    "TABLE",
    "AdaLoRAConfig",
    "BOFTConfig",
    "BitFitConfig",
    "DeLoRAConfig",
    "DoRAConfig",
    "HRAConfig",
    "IA3Config",
    "IA3FFConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoRAConfig",
    "OFTConfig",
    "OLoRAConfig",
    "PiSSAConfig",
    "ROADConfig",
    "VeRAConfig",
    "variants",
]

TABLE = (
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
)

for _variant in TABLE:
    register(_variant)
