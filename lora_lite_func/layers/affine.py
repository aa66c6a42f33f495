"""Recognising a layer that is more than its product x W^T + b, as merging takes it to be.

A tiny call on a copy tells.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.site import Site
from ..core.torch_internals import is_tracing_here
from .kinds import matrix

__all__ = ["is_affine"]


def is_affine(module: Any, site: Site) -> bool:
    """Whether a linear-like layer's own call is x W^T + b; also where that can't be tried."""
    base: type[nn.Module] = getattr(type(module), "_ll_base", type(module))
    weight = module._parameters["weight"]
    if base.forward is nn.Linear.forward or weight.is_meta or is_tracing_here():
        return True
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, site.d_in, generator=gen, device="cpu").to(weight.device, weight.dtype)
    try:
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            probe: Any = copy.deepcopy(module).eval()  # a call may write on what it holds
            y = base.forward(probe, x)
            expected = F.linear(x, matrix(weight.detach(), site), module._parameters.get("bias"))
    except Exception:  # whatever a stranger's layer says to a tensor it doesn't expect
        return True
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return not isinstance(y, Tensor)
    allowed = 64 * torch.finfo(weight.dtype).eps * max(1.0, expected.abs().max().item())
    return bool((y.to(expected.dtype) - expected).abs().max() <= allowed)
