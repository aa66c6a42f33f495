"""Adapters as values: a functional, JAX-style library of adapters for PyTorch.

import lora_lite_func as ll
params = ll.init(model, ll.LoRAConfig(r=8, alpha=16))
y = ll.apply(model, params, x)
"""

from . import adalora
from .adapter import Adapter
from .api import apply, bind, functional_call, merge, merged, unbind
from .checkpoint import load, save
from .config import AdapterConfig
from .errors import CheckpointError, ConfigError, LoraLiteError, StructureError, TargetError, UnsupportedError
from .initialization import init, targets
from .spec import ParamSpec, Site, Variant, register
from .transforms import cast, combine, num_params, partition, scale, stack, summary, unstack
from .variants import (
    AdaLoRAConfig,
    AntiPaSTOConfig,
    BitFitConfig,
    BOFTConfig,
    C3AConfig,
    DeLoRAConfig,
    DoRAConfig,
    FourierFTConfig,
    GraLoRAConfig,
    HiRAConfig,
    HRAConfig,
    IA3Config,
    IA3FFConfig,
    LoHaConfig,
    LoKrConfig,
    LoRAConfig,
    MiSSConfig,
    OFTConfig,
    OLoRAConfig,
    PiSSAConfig,
    RandLoRAConfig,
    ROADConfig,
    SHiRAConfig,
    SSVDConfig,
    VeRAConfig,
    variants,
)

__version__ = "0.1.0"

__all__ = [
    "AdaLoRAConfig",
    "Adapter",
    "AdapterConfig",
    "AntiPaSTOConfig",
    "BOFTConfig",
    "BitFitConfig",
    "C3AConfig",
    "CheckpointError",
    "ConfigError",
    "DeLoRAConfig",
    "DoRAConfig",
    "FourierFTConfig",
    "GraLoRAConfig",
    "HRAConfig",
    "HiRAConfig",
    "IA3Config",
    "IA3FFConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoRAConfig",
    "LoraLiteError",
    "MiSSConfig",
    "OFTConfig",
    "OLoRAConfig",
    "ParamSpec",
    "PiSSAConfig",
    "ROADConfig",
    "RandLoRAConfig",
    "SHiRAConfig",
    "SSVDConfig",
    "Site",
    "StructureError",
    "TargetError",
    "UnsupportedError",
    "Variant",
    "VeRAConfig",
    "adalora",
    "apply",
    "bind",
    "cast",
    "combine",
    "functional_call",
    "init",
    "load",
    "merge",
    "merged",
    "num_params",
    "partition",
    "register",
    "save",
    "scale",
    "stack",
    "summary",
    "targets",
    "unbind",
    "unstack",
    "variants",
]
