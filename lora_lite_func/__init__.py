"""Adapters as values: a functional, JAX-style library of adapters for PyTorch.

    import lora_lite_func as ll

    params = ll.init(model, ll.LoRAConfig(r=8, alpha=16))  # {module path: {lora_A, lora_B}}
    y = ll.apply(model, params, x)  # model(x) with the adapter in

This file is the public surface: names, where they come from, and where pickles find them. The
guides beside it (guides/README.md) show each name at work, variants/README.md lists the methods.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .algebra import adalora, adamss
from .algebra.activated import activated, invoked
from .algebra.adamw import AdamW, AdamWState, adamw
from .algebra.bank import Bank
from .algebra.clip import clip_grads
from .algebra.gradients import grad, value_and_grad
from .algebra.lori import masked_by
from .algebra.mean import mean
from .algebra.mixed import Mixed, mixed
from .algebra.partition import combine, partition
from .algebra.penalty import penalty
from .algebra.plain_data import from_dict, ravel, to_dict
from .algebra.rows import Rows, rows
from .algebra.stack import concatenate, names, num_members, stack, unstack, update
from .algebra.tree import cast, num_params, project, scale, summary
from .api.apply import apply, functional_call
from .api.bind import bind, prepared, reference, unbind
from .api.bind_requests import bind_requests
from .api.calibrate import calibrate
from .api.functional import functional
from .api.init import init, targets
from .api.merge import merge, merged
from .api.per_sample import per_sample_grads
from .api.report import Report
from .core.absent import ABSENT
from .core.adapter import Adapter, rebuild
from .core.config import AdapterConfig
from .core.errors import (
    CheckpointError,
    ConfigError,
    LoraLiteError,
    StructureError,
    TargetError,
    UnsupportedError,
)
from .core.layout import Layout
from .core.method import Layer, ParamSpec, Variant
from .core.pinning import pin
from .core.pytree import register_adapter
from .core.registry import register, variant_for
from .core.site import Site
from .core.stacked import Stacked
from .core.statistics import Moments, SiteStatistics, Statistics
from .injection.prompt import prompted
from .io.checkpoint import load, save
from .kernels.row_plan import RowPlan
from .variants import METHODS, variants

__all__ = [
    "ABBAConfig",
    "ASVDConfig",
    "AdaLoRAConfig",
    "AdaMSSConfig",
    "AdamW",
    "AdamWState",
    "Adapter",
    "AdapterConfig",
    "AntiPaSTOConfig",
    "ArrowConfig",
    "BDLoRAConfig",
    "BOFTConfig",
    "Bank",
    "BitFitConfig",
    "C3AConfig",
    "CPTConfig",
    "CartridgeConfig",
    "CheckpointError",
    "ConfigError",
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
    "Layer",
    "LilyConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoRAConfig",
    "LoRAGAConfig",
    "LoRAXSConfig",
    "LoRIConfig",
    "LoReFTConfig",
    "LoftQConfig",
    "LoraLiteError",
    "MPTConfig",
    "MiCAConfig",
    "MiLoRAConfig",
    "MiSSConfig",
    "Mixed",
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
    "ParamSpec",
    "PiSSAConfig",
    "PolyConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "QALoRAConfig",
    "ROADConfig",
    "RaSAConfig",
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
    "TinyLoRAConfig",
    "TokensConfig",
    "UniLoRAConfig",
    "UnsupportedError",
    "VBLoRAConfig",
    "Variant",
    "VeLoRAConfig",
    "VeRAConfig",
    "WaveFTConfig",
    "XLoRA",
    "activated",
    "adalora",
    "adamss",
    "adamw",
    "add",
    "apply",
    "arrow",
    "bind",
    "bind_requests",
    "calibrate",
    "cast",
    "check",
    "clip_grads",
    "collect",
    "combine",
    "combine_adapters",
    "concatenate",
    "from_dict",
    "from_diffusion",
    "from_lora_lite",
    "from_peft",
    "functional",
    "functional_call",
    "grad",
    "init",
    "invoked",
    "load",
    "load_balance",
    "load_into",
    "masked_by",
    "mean",
    "merge",
    "merged",
    "mixed",
    "names",
    "num_members",
    "num_params",
    "partition",
    "penalty",
    "per_sample_grads",
    "precondition",
    "prepared",
    "project",
    "prompted",
    "ravel",
    "reference",
    "register",
    "rows",
    "save",
    "scale",
    "stack",
    "summary",
    "targets",
    "tasks",
    "to_dict",
    "to_diffusion",
    "to_peft",
    "unbind",
    "unstack",
    "update",
    "value_and_grad",
    "variants",
    "xlora",
    "xlora_from_peft",
    "xlora_to_peft",
]

if TYPE_CHECKING:
    from .algebra.arrow import arrow
    from .algebra.combine import add, combine_adapters
    from .algebra.precondition import precondition
    from .algebra.tasks import tasks
    from .api.check import check
    from .api.collect import collect
    from .api.xlora import XLoRA, xlora
    from .api.xlora_files import xlora_from_peft, xlora_to_peft
    from .interop.diffusion import from_diffusion, to_diffusion
    from .interop.into_bank import load_into
    from .interop.lora_lite import from_lora_lite
    from .interop.peft import from_peft, to_peft
    from .kernels.gates import load_balance
    from .variants import (
        ABBAConfig,
        AdaLoRAConfig,
        AdaMSSConfig,
        AntiPaSTOConfig,
        ArrowConfig,
        ASVDConfig,
        BDLoRAConfig,
        BitFitConfig,
        BOFTConfig,
        C3AConfig,
        CartridgeConfig,
        CorDAConfig,
        CPTConfig,
        DEFTConfig,
        DeLoRAConfig,
        DiReFTConfig,
        DoRAConfig,
        EVAConfig,
        FourierFTConfig,
        FRoDConfig,
        FullConfig,
        GLoRAConfig,
        GraLoRAConfig,
        HiRAConfig,
        HRAConfig,
        IA3Config,
        IA3FFConfig,
        KaSAConfig,
        LilyConfig,
        LLaMAAdapterConfig,
        LNTuningConfig,
        LoftQConfig,
        LoHaConfig,
        LoKrConfig,
        LoRAConfig,
        LoRAGAConfig,
        LoRAXSConfig,
        LoReFTConfig,
        LoRIConfig,
        MiCAConfig,
        MiLoRAConfig,
        MiSSConfig,
        MoELoRAConfig,
        MonteCLoRAConfig,
        MoRAConfig,
        MPTConfig,
        OFTConfig,
        OLoRAConfig,
        OSFConfig,
        PEANuTConfig,
        PiSSAConfig,
        PolyConfig,
        PrefixTuningConfig,
        PromptTuningConfig,
        PSOFTConfig,
        PTuningConfig,
        PVeRAConfig,
        QALoRAConfig,
        RandLoRAConfig,
        RaSAConfig,
        ROADConfig,
        SHiRAConfig,
        SSteerConfig,
        SSVDConfig,
        TinyLoRAConfig,
        TokensConfig,
        UniLoRAConfig,
        VBLoRAConfig,
        VeLoRAConfig,
        VeRAConfig,
        WaveFTConfig,
    )

__version__ = "0.2.0"

_ON_USE = {
    "XLoRA": "api.xlora",
    "add": "algebra.combine",
    "arrow": "algebra.arrow",
    "check": "api.check",
    "collect": "api.collect",
    "combine_adapters": "algebra.combine",
    "from_diffusion": "interop.diffusion",
    "from_lora_lite": "interop.lora_lite",
    "from_peft": "interop.peft",
    "load_balance": "kernels.gates",
    "load_into": "interop.into_bank",
    "precondition": "algebra.precondition",
    "tasks": "algebra.tasks",
    "to_diffusion": "interop.diffusion",
    "to_peft": "interop.peft",
    "xlora": "api.xlora",
    "xlora_from_peft": "api.xlora_files",
    "xlora_to_peft": "api.xlora_files",
    **{config: "variants" for _, config in METHODS.values()},
}
"""Where names are that are imported when they are first asked for: the methods, readers and writers
of other libraries' files, and what most programs don't use. Importing the library takes no longer
for them."""


if not TYPE_CHECKING:  # a type checker has the imports above, and finds a misspelt name

    def __getattr__(name: str) -> Any:
        if name not in _ON_USE:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}",
                name=name,
                obj=sys.modules[__name__],
            )
        value = getattr(importlib.import_module(f".{_ON_USE[name]}", __name__), name)
        pin((name,), {name: value}, __name__)
        globals()[name] = value
        return value


register_adapter()

_PICKLED = {
    "ABSENT": ABSENT,
    "Layout": Layout,
    "Moments": Moments,
    "RowPlan": RowPlan,
    "SiteStatistics": SiteStatistics,
    "Stacked": Stacked,
    "rebuild": rebuild,
    "variant_for": variant_for,
}
"""What pickles of public values name besides public classes: found here whatever file it is in."""

pin((name for name in __all__ if name not in _ON_USE), globals(), __name__)
pin(_PICKLED, _PICKLED, __name__)
for _module in (adalora, adamss):
    _public = f"{__name__}.{_module.__name__.rpartition('.')[2]}"
    pin(_module.__all__, vars(_module), _public)
    sys.modules[_public] = _module
type(ABSENT).__module__ = __name__

lookup = variant_for
for _old in ("adapter", "layout", "spec"):  # where pickles of 0.1.0 look for what they name
    sys.modules.setdefault(f"{__name__}.{_old}", sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
