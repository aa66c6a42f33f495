"""The table of methods, one file each. A new one is a file here and a row below; outsiders call `ll.register`."""

from __future__ import annotations

from ..spec import register, variants
from . import delora, dora, hra, ia3, lora, pissa, road
from .delora import DeLoRAConfig
from .dora import DoRAConfig
from .hra import HRAConfig
from .ia3 import IA3Config, IA3FFConfig
from .lora import LoRAConfig
from .pissa import PiSSAConfig
from .road import ROADConfig

__all__ = [
    "TABLE",
    "DeLoRAConfig",
    "DoRAConfig",
    "HRAConfig",
    "IA3Config",
    "IA3FFConfig",
    "LoRAConfig",
    "PiSSAConfig",
    "ROADConfig",
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
)

for _variant in TABLE:
    register(_variant)
