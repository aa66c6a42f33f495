"""A packed (quantised) layer's weight as plain numbers.

It is read from the packings known here, else by asking the layer what it makes of unit vectors. The
layer itself is never written: some packings rearrange themselves when they are asked, so what is
asked is a copy.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedError
from ..core.torch_internals import is_wrapper

__all__ = ["dequantised", "unpacked"]


def dequantised(module: Any, weight: Tensor) -> Tensor:
    """The dense (d_out, d_in) values that a packed linear-like layer multiplies by, float32 at
    least: a new tensor.

    Raises:
        UnsupportedError: nothing here knows the packing, and the layer can't be called on plain
            vectors.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        for read in (_wrapped, _rows_of_bytes, _four_bits, _asked):
            values = read(module, weight)
            if values is not None and values.numel() == module.in_features * module.out_features:
                return values.reshape(module.out_features, module.in_features).to(
                    torch.promote_types(values.dtype, torch.float32)
                )
    raise UnsupportedError(
        f"{type(module).__name__} keeps its weight in a packing that can't be read "
        f"({weight.dtype}, {tuple(weight.shape)})"
    )


def unpacked(module: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """A dense layer with a packed layer's place and mode: of its own class where the packing is the
    tensor's, else an nn.Linear.
    """
    made: Any = nn.Linear(
        module.in_features, module.out_features, bias=bias is not None, device="meta"
    )
    if is_wrapper(module._parameters["weight"]):
        made = copy.copy(module)
        made.__dict__["_parameters"] = dict(module._parameters)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return made.train(module.training)


def _wrapped(module: Any, weight: Any) -> Tensor | None:
    """The values of a tensor subclass that can give them (torchao)."""
    values = weight.dequantize() if is_wrapper(weight) and hasattr(weight, "dequantize") else None
    return values if isinstance(values, Tensor) else None


def _rows_of_bytes(module: Any, weight: Any) -> Tensor | None:
    """The values of bitsandbytes' 8-bit packing: whole numbers (d_out, d_in) and each row's largest
    magnitude, which the layer's first call moves to its state.
    """
    state = getattr(module, "state", None)
    scale = getattr(weight, "SCB", None)
    scale = getattr(state, "SCB", None) if scale is None else scale
    if weight.dtype != torch.int8 or not isinstance(scale, Tensor):
        return None
    return weight.detach().as_subclass(Tensor).float() * scale.float()[:, None] / 127.0


def _four_bits(module: Any, weight: Any) -> Tensor | None:
    """The values of bitsandbytes' 4-bit packing, also as its CPU kernels rearrange them."""
    state = getattr(weight, "quant_state", None)
    state = getattr(module, "quant_state", None) if state is None else state
    if state is None or not type(module).__module__.startswith("bitsandbytes"):
        return None
    functional = importlib.import_module("bitsandbytes.functional")
    data = weight.detach().as_subclass(Tensor)
    if getattr(state, "packing_format_for_cpu", False):
        back = getattr(functional, "_convert_weight_packed_for_cpu_inverse", None)
        if back is None:
            return None
        data, state = back(data.clone(), copy.deepcopy(state))
    values: Tensor = functional.dequantize_4bit(data, state)
    return values


def _asked(module: Any, weight: Tensor) -> Tensor | None:
    """What a copy of the layer makes of each unit vector."""
    try:
        probe = module
        if hasattr(type(module), "_ll_base"):  # a site's copy: the layer underneath
            probe = object.__new__(type(module)._ll_base)
            probe.__dict__.update({**module.__dict__, "_modules": {}})
        probe = copy.deepcopy(probe).train()
        dtype = getattr(module, "compute_dtype", None) or torch.float32
        unit = torch.eye(module.in_features, dtype=dtype, device=weight.device)
        return (probe(unit) - probe(torch.zeros_like(unit[:1]))).mT
    except Exception:  # whatever a stranger's layer says to a plain vector
        return None
