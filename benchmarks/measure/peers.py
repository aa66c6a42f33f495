"""What a run measures beside: PEFT (extra `bench`), and lora-lite from a checkout."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any, cast

import optree
import torch

import lora_lite_func as ll

__all__ = ["PROJECTIONS", "lora", "lora_lite", "noisy", "peft_adapted", "peft_lora"]

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""All linear layers of a Llama block."""


def lora(base: Any, r: int = 8, **config: Any) -> ll.Adapter:
    """Our LoRA on every projection, with noise on B so that nothing is zero."""
    return noisy(
        ll.init(base, ll.LoRAConfig(r=r, alpha=16, target_names=tuple(PROJECTIONS), **config))
    )


def noisy(params: ll.Adapter, seed: int = 1, size: float = 1e-3) -> ll.Adapter:
    """An adapter as if trained: its start with noise on what is trainable."""
    trainable, frozen = ll.partition(params)
    gen = torch.Generator().manual_seed(seed)
    moved: Any = optree.tree_map(
        lambda t: t + size * torch.randn(t.shape, generator=gen).to(t), cast("Any", trainable)
    )
    return ll.combine(moved, frozen)


def peft_adapted(base: Any, config: str, **fields: Any) -> Any:
    """The same base under PEFT's layers, the config's class by name."""
    import peft

    return peft.get_peft_model(
        copy.deepcopy(base), getattr(peft, config)(target_modules=PROJECTIONS, **fields)
    ).eval()


def peft_lora(base: Any, r: int = 8, **fields: Any) -> Any:
    """The same base under PEFT's LoRA on all seven projections."""
    return peft_adapted(base, "LoraConfig", r=r, lora_alpha=16, **fields)


def lora_lite(base: Any, checkout: Path | None, r: int = 8) -> Any:
    """The same base under lora-lite's LoRA on all seven projections; None without a checkout."""
    if checkout is None:
        return None
    source = checkout / "src" if (checkout / "src").is_dir() else checkout
    if str(source) not in sys.path:
        sys.path.insert(0, str(source))
    package = importlib.import_module("lora_lite")
    model = copy.deepcopy(base)
    package.attach(
        model,
        package.LoRAConfig(r=r, alpha=16, dtype=torch.float32, target_names=tuple(PROJECTIONS)),
    )
    return model
