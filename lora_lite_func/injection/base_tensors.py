"""What a copied tree holds of the base's tensors: constants for a call, parameters for a kept copy.

Nothing here writes on the base, and no gradient reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.torch_internals import is_wrapper
from ..layers.weights import is_packed

__all__ = ["BaseTensors", "Constants", "Frozen", "constant", "own_bias", "own_buffers"]


class BaseTensors(Protocol):
    """What a tree has in place of the base's tensors.

    Attributes:
        kept: whether the tree lives longer than a call, so that it has configs and state dict hooks
            of its own.
    """

    kept: bool

    def __call__(self, copy: nn.Module, path: str) -> None:
        """Replace the parameters and buffers that the copy of a module has from the base."""

    def beside(self, tensor: Tensor, training: bool) -> Tensor:
        """What stands for a tensor that a module holds beside its parameters and buffers.

        Args:
            tensor: the module's tensor.
            training: whether the module is in training mode.
        """


class Constants:
    """What a copy holds in `apply`: the base's own tensors as constants, or those of `base`.

    Args:
        base: {full name: tensor} to use instead of the model's own; gradients reach these.
    """

    kept = False

    def __init__(self, base: Mapping[str, Tensor]) -> None:
        self.grad = torch.is_grad_enabled()
        self.base = base
        self.made: dict[int, Tensor] = {}

    def __call__(self, copy: nn.Module, path: str) -> None:
        parameters: dict[str, Any] = copy._parameters
        given = self._replace(copy, path) if self.base else ()
        if copy._buffers and (self.grad or copy.training):
            self._buffers(copy, given)
        if not parameters:
            return
        own_bias(copy)
        if self.grad:
            for name, p in parameters.items():
                if p is not None and p.requires_grad and name not in given:
                    parameters[name] = constant(p, copy)

    def _buffers(self, copy: nn.Module, given: Any) -> None:
        buffers, training = copy._buffers, copy.training
        weights = _packed_buffers(copy) if training else ()
        for name, b in buffers.items():
            if b is None or name in given:
                continue
            if training and name not in weights:
                buffers[name] = _clone(b, self.made)
            elif b.requires_grad:
                buffers[name] = b.detach()

    def _replace(self, copy: nn.Module, path: str) -> set[str]:
        """Put the tensors of `base` in, and return the names that it gave."""
        given = set()
        for tensors in (copy._parameters, copy._buffers):
            held: dict[str, Any] = tensors
            for name in held:
                found = self.base.get(f"{path}.{name}" if path else name)
                if found is not None:
                    held[name] = found
                    given.add(name)
        if "weight" in given and "_ll" in copy.__dict__:
            copy.__dict__["_ll"].rebased = True
        return given

    def beside(self, tensor: Tensor, training: bool) -> Tensor:
        if training:
            return _clone(tensor, self.made)
        return tensor.detach() if self.grad and tensor.requires_grad else tensor


class Frozen:
    """What a kept copy holds: parameters on the base's storage, and buffers of its own.

    The parameters are new and don't require gradients. Tied ones stay tied.

    Args:
        keep_flags: whether parameters require gradients where the base's do.
    """

    kept = True

    def __init__(self, keep_flags: bool = False) -> None:
        self.parameters: dict[int, Tensor] = {}
        self.made: dict[int, Tensor] = {}
        self.keep_flags = keep_flags

    def __call__(self, copy: nn.Module, path: str) -> None:
        parameters: dict[str, Any] = copy._parameters
        for name, p in parameters.items():
            if p is None:
                continue
            if id(p) not in self.parameters:
                self.parameters[id(p)] = _parameter(p, p.requires_grad and self.keep_flags)
            parameters[name] = self.parameters[id(p)]
        own_buffers(copy, self.made)

    def beside(self, tensor: Tensor, training: bool) -> Tensor:
        return _clone(tensor, self.made)


def _parameter(p: Tensor, requires_grad: bool) -> Tensor:
    """A parameter of the same class, on the same storage and with the same attributes."""
    if type(p) is nn.Parameter or is_wrapper(p):
        made: Tensor = nn.Parameter(p.detach(), requires_grad=requires_grad)
    else:
        made = Tensor._make_subclass(type(p), p.detach(), requires_grad)
    if p.__dict__:
        made.__dict__.update(p.__dict__)
    return made


def _clone(tensor: Tensor, made: dict[int, Tensor]) -> Tensor:
    """A tensor of the tree's own, the same one wherever the base has the same one."""
    found = made.get(id(tensor))
    if found is None:
        found = made[id(tensor)] = tensor.detach().clone()
    return found


def _packed_buffers(copy: Any) -> tuple[str, ...]:
    """The buffers of a quantised layer that hold its weight.

    No call writes on them, and to copy them would cost what packing saves.
    """
    if "weight" in copy._parameters or not isinstance(getattr(copy, "in_features", None), int):
        return ()
    size = copy.in_features * getattr(copy, "out_features", 1)
    return tuple(
        name
        for name, b in copy._buffers.items()
        if b is not None and is_packed(b) and b.numel() * 32 >= size and b.numel() > 1
    )


def constant(parameter: Tensor, copy: nn.Module) -> Tensor:
    """A parameter's values without its gradient, on the same storage."""
    # Accelerate rebuilds the parameter from its class, so it has to be a parameter.
    if "_hf_hook" in copy.__dict__:
        return nn.Parameter(parameter.detach(), requires_grad=False)
    return parameter.detach()


def own_bias(copy: nn.Module) -> None:
    """Give the copy of a packed layer a bias of its own.

    A packed layer may cast its bias in place to the dtype of its input (bitsandbytes).
    """
    parameters: dict[str, Any] = copy._parameters
    W, b = parameters.get("weight"), parameters.get("bias")
    if b is not None and W is not None and not W.is_floating_point():
        parameters["bias"] = b.detach()


def own_buffers(copy: nn.Module, made: dict[int, Tensor] | None = None) -> None:
    """Clone the buffers that a forward may write on: statistics, counters and masks.

    Buffers that hold a packed weight are not cloned.

    Args:
        copy: the copy of a module.
        made: {id of a buffer: its clone}, where other modules may have the same buffers; clones are
            added to it.
    """
    weights, made = _packed_buffers(copy), {} if made is None else made
    for name, b in copy._buffers.items():
        if b is not None and name not in weights:
            copy._buffers[name] = _clone(b, made)
