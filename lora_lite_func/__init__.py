"""Adapters as values: a functional, JAX-style library of adapters for PyTorch.

import lora_lite_func as ll
params = ll.init(model, ll.LoRAConfig(r=8, alpha=16))
y = ll.apply(model, params, x)
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from . import adalora
from .adapter import Adapter
from .api import apply, functional_call
from .binding import bind, prepared, unbind
from .calibration import calibrate
from .checking import check
from .checkpoint import load, save
from .compose import add, combine_adapters
from .config import AdapterConfig
from .dense import merge, merged
from .errors import CheckpointError, ConfigError, LoraLiteError, StructureError, TargetError, UnsupportedError
from .hidden import prompted
from .initialization import init, targets
from .optim import AdamW, AdamWState, adamw, clip_grads
from .report import Report
from .rows import Rows, rows
from .samples import per_sample_grads
from .spec import ParamSpec, Site, Variant, register
from .stacks import concatenate, names, num_members, stack, unstack, update
from .statistics import Statistics
from .transforms import cast, combine, num_params, partition, project, scale, summary
from .variants import (
    AdaLoRAConfig,
    AntiPaSTOConfig,
    ASVDConfig,
    BitFitConfig,
    BOFTConfig,
    C3AConfig,
    CorDAConfig,
    DeLoRAConfig,
    DiReFTConfig,
    DoRAConfig,
    EVAConfig,
    FourierFTConfig,
    FullConfig,
    GraLoRAConfig,
    HiRAConfig,
    HRAConfig,
    IA3Config,
    IA3FFConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoRAConfig,
    LoRAGAConfig,
    LoReFTConfig,
    MiSSConfig,
    OFTConfig,
    OLoRAConfig,
    PiSSAConfig,
    RandLoRAConfig,
    ROADConfig,
    SHiRAConfig,
    SSteerConfig,
    SSVDConfig,
    TokensConfig,
    VeRAConfig,
    variants,
)

if TYPE_CHECKING:
    from .diffusion import from_diffusion
    from .lora_lite import from_lora_lite
    from .peft import from_peft, to_peft

__version__ = "0.1.0"

__all__ = [
    "ASVDConfig",
    "AdaLoRAConfig",
    "AdamW",
    "AdamWState",
    "Adapter",
    "AdapterConfig",
    "AntiPaSTOConfig",
    "BOFTConfig",
    "BitFitConfig",
    "C3AConfig",
    "CheckpointError",
    "ConfigError",
    "CorDAConfig",
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
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoRAConfig",
    "LoRAGAConfig",
    "LoReFTConfig",
    "LoraLiteError",
    "MiSSConfig",
    "OFTConfig",
    "OLoRAConfig",
    "ParamSpec",
    "PiSSAConfig",
    "ROADConfig",
    "RandLoRAConfig",
    "Report",
    "Rows",
    "SHiRAConfig",
    "SSVDConfig",
    "SSteerConfig",
    "Site",
    "Statistics",
    "StructureError",
    "TargetError",
    "TokensConfig",
    "UnsupportedError",
    "Variant",
    "VeRAConfig",
    "adalora",
    "adamw",
    "add",
    "apply",
    "bind",
    "calibrate",
    "cast",
    "check",
    "clip_grads",
    "combine",
    "combine_adapters",
    "concatenate",
    "from_diffusion",
    "from_lora_lite",
    "from_peft",
    "functional_call",
    "init",
    "load",
    "merge",
    "merged",
    "names",
    "num_members",
    "num_params",
    "partition",
    "per_sample_grads",
    "prepared",
    "project",
    "prompted",
    "register",
    "rows",
    "save",
    "scale",
    "stack",
    "summary",
    "targets",
    "to_peft",
    "unbind",
    "unstack",
    "update",
    "variants",
]

_ON_USE = {"from_diffusion": "diffusion", "from_lora_lite": "lora_lite", "from_peft": "peft", "to_peft": "peft"}
"""Readers and writers of other libraries' files, imported when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    return getattr(importlib.import_module(f".{_ON_USE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
