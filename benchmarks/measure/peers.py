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

__all__ = [
    "PROJECTIONS",
    "lora",
    "lora_lite",
    "lora_lite_package",
    "noisy",
    "peft_adapted",
    "peft_lora",
]

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


# --------------------------------------------------------------------------------------- lora-lite
_LITE: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoRAConfig", {}),
    "pissa": ("PiSSAConfig", {}),
    "delora": ("DeLoRAConfig", {}),
    "dora": ("DoRAConfig", {}),
    "hra": ("HRAConfig", {}),
    "ia3": ("IA3Config", {}),
    "ia3_ff": ("IA3FFConfig", {}),
    "road": ("RoadConfig", {"group_size": 32}),  # it has to divide 1376
}
"""By our names of the methods, lora-lite's configs: those that need no data."""


def lora_lite_package(checkout: Path) -> Any:
    """lora-lite's package from a checkout of it.

    Raises:
        ValueError: it isn't there, or can't be imported; the message says why.
    """
    source = checkout / "src" if (checkout / "src").is_dir() else checkout
    if not (source / "lora_lite" / "__init__.py").is_file():
        raise ValueError(
            f"--lora-lite {checkout}: expected a checkout of lora-lite, found no lora_lite in "
            f"{source}"
        )
    if str(source) not in sys.path:
        sys.path.insert(0, str(source))
    try:
        return importlib.import_module("lora_lite")
    except ImportError as error:
        raise ValueError(
            f"--lora-lite {checkout}: lora_lite can't be imported ({error}); its dependencies "
            f"(einops, jaxtyping) have to be installed"
        ) from error


def lora_lite(base: Any, checkout: Path | None, r: int = 8, method: str = "lora") -> Any:
    """The same base under one of lora-lite's methods on all seven projections, in float32 as ours.

    None without a checkout, and for a method that it hasn't.
    """
    if checkout is None or method not in _LITE:
        return None
    package, model = lora_lite_package(checkout), copy.deepcopy(base)
    name, fields = _LITE[method]
    config = getattr(package, name)
    names = tuple(PROJECTIONS)
    package.attach(model, config(r=r, dtype=torch.float32, target_names=names, **fields))
    return model
