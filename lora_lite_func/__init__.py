"""Adapters as values: a functional, JAX-style library of adapters for PyTorch.

import lora_lite_func as ll
params = ll.init(model, ll.LoRAConfig(r=8, alpha=16))
y = ll.apply(model, params, x)
"""

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
    BitFitConfig,
    BOFTConfig,
    DeLoRAConfig,
    DoRAConfig,
    HRAConfig,
    IA3Config,
    IA3FFConfig,
    LoHaConfig,
    LoKrConfig,
    LoRAConfig,
    OFTConfig,
    OLoRAConfig,
    PiSSAConfig,
    ROADConfig,
    VeRAConfig,
    variants,
)

__version__ = "0.1.0"

__all__ = [
    "AdaLoRAConfig",
    "Adapter",
    "AdapterConfig",
    "BOFTConfig",
    "BitFitConfig",
    "CheckpointError",
    "ConfigError",
    "DeLoRAConfig",
    "DoRAConfig",
    "HRAConfig",
    "IA3Config",
    "IA3FFConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoRAConfig",
    "LoraLiteError",
    "OFTConfig",
    "OLoRAConfig",
    "ParamSpec",
    "PiSSAConfig",
    "ROADConfig",
    "Site",
    "StructureError",
    "TargetError",
    "UnsupportedError",
    "Variant",
    "VeRAConfig",
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
