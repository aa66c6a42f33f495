"""Reading a layer, without writing on it.

Is it linear-like, in which dtype and where does it compute, what is its dense weight.
"""

from __future__ import annotations

import copy
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..core.errors import UnsupportedError
from ..core.torch_internals import first_of, is_wrapper, without_class
from .quantised import dequantised
from .sharded import whole

__all__ = [
    "compute_dtype",
    "dense_weight",
    "device_of",
    "how_to_bake",
    "is_dense",
    "is_linear_like",
    "is_packed",
    "is_size",
    "own_tensor",
    "read_tensor",
    "stored",
]


def is_size(value: Any) -> bool:
    """Whether it is a whole number, of Python's or of numpy's (`nn.Linear(np.prod(shape), 8)`)."""
    return isinstance(value, (int, numbers.Integral))


def is_linear_like(module: Any) -> bool:
    """Whether it has in_features, out_features, weight and a call: nn.Linear, its subclasses, and
    the quantised ones.
    """
    return (
        is_size(getattr(module, "in_features", None))
        and is_size(getattr(module, "out_features", None))
        and isinstance(stored(module, "weight"), Tensor)
        and _is_its_own(module, "weight")
        and callable(module)
    )


def _is_its_own(module: Any, name: str) -> bool:
    """Whether the tensor is the module's own, not one that `__getattr__` fetches from a wrapped
    layer.
    """
    own = vars(module)
    return (
        name in own.get("_parameters", ())
        or name in own.get("_buffers", ())
        or name in own
        or hasattr(type(module), name)
    )


def stored(module: Any, name: str) -> Any:
    """A layer's tensor as it is stored: of a computed one what it is computed from, as computing it
    may write on the model, and what was computed last may be of another dtype or device.
    """
    own = getattr(module, "__dict__", {}).get("_parameters", {})
    if name in own:  # a parametrized tensor isn't in there
        return own[name]
    if parametrize.is_parametrized(module, name):
        held = module.parametrizations[name]
        if hasattr(held, "original"):
            return held.original
        parts = [
            t
            for name, t in {**held._parameters, **held._buffers}.items()
            if name.startswith("original")
        ]
        return max(parts, key=Tensor.numel)  # where there are a size and a direction, the direction
    if name not in own and _computing_hooks(module, name):
        sources = (own.get(name + suffix) for suffix in ("_v", "_orig"))
        found = first_of((t for t in sources if t is not None), None)
        if found is not None:
            return found
    return getattr(module, name, None)


def _computing_hooks(module: Any, name: str) -> list[Any]:
    """The hooks by which torch.nn.utils' weight_norm, spectral_norm and prune compute a tensor
    before each call.
    """
    hooks = getattr(module, "__dict__", {}).get("_forward_pre_hooks") or {}
    return [
        hook
        for hook in hooks.values()
        if (isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == name)
        or getattr(hook, "_tensor_name", None) == name  # a pruning method
    ]


def own_tensor(module: Any, name: str) -> Tensor | None:
    """A module's parameter of a name, or its buffer (a norm's running statistics)."""
    tensor: Tensor | None = module._parameters.get(name)
    return module._buffers.get(name) if tensor is None else tensor


def how_to_bake(module: Any, name: str) -> str:
    """What turns a layer's computed tensor into a parameter again."""
    if parametrize.is_parametrized(module, name):
        return f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
    hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    known = {
        "WeightNorm": "remove_weight_norm(layer)",
        "SpectralNorm": "remove_spectral_norm(layer)",
    }
    found = first_of((f"torch.nn.utils.{known[hook]}" for hook in hooks if hook in known), None)
    if found is None and f"{name}_mask" in module._buffers:
        found = f"torch.nn.utils.prune.remove(layer, {name!r})"
    return found or f"give the layer a parameter {name!r}"


def is_packed(weight: Tensor) -> bool:
    """Whether it is quantised: not a floating tensor of 16 bits at least, or of a subclass that
    keeps its values in other tensors.
    """
    return not weight.is_floating_point() or weight.itemsize == 1 or is_wrapper(weight)


def read_tensor(module: Any, name: str = "weight") -> Tensor:
    """A tensor as it is stored; one that is offloaded, or still in a file, is read.

    Raises:
        UnsupportedError: it is on the meta device without a map to load it from.
    """
    tensor: Tensor = stored(module, name)
    if not tensor.is_meta:
        return tensor.detach()
    weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if weights_map is None:
        raise UnsupportedError(
            f"{name} of this {type(module).__name__} is on the meta device; load the model's "
            f"weights first"
        )
    found: Tensor = weights_map[name]
    return found


def is_dense(weight: Tensor, size: int) -> bool:
    """Whether it is a plain floating tensor of so many entries, not packed."""
    return weight.numel() == size and not is_packed(weight)


def compute_dtype(module: Any, name: str = "weight") -> torch.dtype:
    """The floating dtype a layer computes in: its weight's, a quantised layer's own choice, or
    float32.
    """
    weight = stored(module, name)
    if weight.is_floating_point() and weight.itemsize > 1:
        return weight.dtype
    declared = getattr(module, "compute_dtype", None)
    return declared if isinstance(declared, torch.dtype) else torch.float32


def device_of(module: Any, name: str = "weight") -> torch.device:
    """Where a layer computes: its weight's device, or where accelerate's hook brings an offloaded
    one.
    """
    device: torch.device = stored(module, name).device
    if device.type == "meta":
        target = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        return device if target is None else torch.device(target)
    return device


def dense_weight(module: Any, method: str, size: int, name: str = "weight") -> Tensor:
    """A layer's weight as a dense tensor of its stored shape (a packed one's values), float32 at
    least, the caller's own.

    Args:
        module: the layer.
        method: the method that asks, for the message.
        size: how many entries it should have.
        name: the name of the tensor in the layer.

    Raises:
        UnsupportedError: it is packed in a way that can't be read, has entries that aren't finite,
            or is on the meta device without a map to load it from.
    """
    weight = whole(_computed(module, name))
    if weight.is_meta:
        weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights_map is None:
            raise UnsupportedError(
                f"{method} reads the weight, which is on the meta device; load the model's "
                f"weights first"
            )
        weight = weights_map[name]
    if is_packed(weight) and name == "weight" and is_linear_like(module):
        try:
            weight = dequantised(module, weight)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"{method} needs the dense weight; {error}; {_WITHOUT}"
            ) from None
    if not is_dense(weight, size):
        raise UnsupportedError(
            f"{method} needs the dense weight, found {type(module).__name__} with a "
            f"{weight.dtype} one of shape {tuple(weight.shape)}; {_WITHOUT}"
        )
    if not weight.isfinite().all():
        raise UnsupportedError(
            f"{method} reads the weight, which has entries that aren't finite; repair it, or "
            f"leave the layer out"
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    return without_class(weight.detach().to(wide, copy=True))


_WITHOUT = (
    "use a method that needs none there (LoRA, IA3, HRA ...), or initialise on the unquantised "
    "model"
)


def _computed(module: Any, name: str) -> Tensor:
    """The weight that the layer would compute now, in evaluation mode, on a copy."""
    if parametrize.is_parametrized(module, name):
        with torch.no_grad():
            return copy.deepcopy(module.parametrizations[name]).eval()()
    hooks = _computing_hooks(module, name)
    if hooks:
        module = _with_own_attributes(module)
        with torch.no_grad():
            for hook in hooks:
                hook(module, None)  # it sets the tensor on the copy
    weight: Tensor = getattr(module, name)
    return weight


def _with_own_attributes(module: Any) -> Any:
    """A shallow copy in evaluation mode: what is set on it isn't set on the module."""
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__, training=False)
    return made
