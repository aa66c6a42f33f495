"""Recognising a norm by what it does.

A tiny call on a copy tells whether a module normalises, and whether it uses 1 + its weight.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..core.torch_internals import CALL_HOOKS, RUNNING_NORMS

__all__ = ["normalises", "uses_one_plus"]

_TORCHS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, RUNNING_NORMS)
_LIKE = 1e-2
"""Far more than eps does to the output of a norm whose input grows eightfold."""


def normalises(module: nn.Module) -> bool:
    """Whether it is a torch norm with a gain, or a leaf module with a 1-D weight (and bias) whose
    output forgets the length of its input.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        return False
    if isinstance(module, _TORCHS):
        return True
    if weight.ndim != 1 or module._modules or not set(module._parameters) <= {"weight", "bias"}:
        return False
    x = torch.randn(2, 3, len(weight), generator=torch.Generator().manual_seed(0), device="cpu")
    near, far = (_probed(module, 0.5, scale * x) for scale in (1.0, 8.0))
    if near is None or far is None or near.shape != x.shape:
        return False
    return bool((near - far).abs().max() < _LIKE * near.abs().max()) and bool(near.std() > _LIKE)


def uses_one_plus(module: nn.Module) -> bool:
    """Whether a norm multiplies by 1 + its weight, as Gemma's do: a weight of zeros then doesn't
    silence it.
    """
    if isinstance(module, _TORCHS):
        return False
    weight: Any = module.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, len(weight), generator=generator, device="cpu")
    y = _probed(module, 0.0, x)
    return y is not None and bool(y.abs().max() > _LIKE)


def _probed(module: nn.Module, gain: float, x: Tensor) -> Tensor | None:
    """The output of a copy with every gain at `gain` and no bias; None if it can't be called so."""
    probe = object.__new__(type(module))
    probe.__dict__.update(module.__dict__)
    for name in CALL_HOOKS:
        probe.__dict__[name] = type(module.__dict__[name])()
    given: dict[str, Any] = {
        name: None if p is None else torch.zeros(p.shape, device="cpu")
        for name, p in module._parameters.items()
    }
    probe.__dict__["_parameters"] = {
        **given,
        "weight": torch.full((x.shape[-1],), gain, device="cpu"),
    }
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            probe = copy.deepcopy(probe)  # a call may write on what it holds
            y = type(module).forward(probe, x)
    except Exception:  # whatever a stranger's module says to a tensor it doesn't expect
        return None
    return y.float() if isinstance(y, Tensor) else None
