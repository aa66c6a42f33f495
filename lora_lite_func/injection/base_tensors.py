"""What a copied tree holds of the base's tensors: constants for a call, parameters for a kept copy.

Nothing here writes on the base, and no gradient reaches it.
"""

from __future__ import annotations

import copy as copying
from collections.abc import Container, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.torch_internals import (
    is_transformed,
    is_wrapped,
    is_wrapper,
    outside_transforms,
    parameter_of,
    with_class,
    with_notes,
)
from ..layers.weights import is_packed
from .in_place_writes import may_write

__all__ = [
    "BaseTensors",
    "Constants",
    "Frozen",
    "constant",
    "own_bias",
    "own_buffers",
    "own_memory",
    "own_written",
    "parameter_like",
]


class BaseTensors(Protocol):
    """What a tree has in place of the base's tensors.

    Attributes:
        kept: whether the tree lives longer than a call, so that it has configs and state dict hooks
            of its own.
    """

    kept: bool

    def __call__(self, copy: nn.Module, path: str) -> None:
        """Replace the parameters and buffers that the copy of a module has from the base."""

    made: dict[int, Any]
    """{id of a tensor or array of the base: the tree's own one, which is cloned from it}."""

    def tensor_for(self, memory: Any, holder: nn.Module) -> Any:
        """What stands for numbers that a module holds besides its parameters and buffers.

        Args:
            memory: the module's tensor or array (references.holds_numbers).
            holder: the module's copy.
        """


class Constants:
    """What a copy holds in `apply`: the base's own tensors as constants, or those of `base`.

    Args:
        base: {full name: tensor} to use instead of the model's own; gradients reach these.
        detach: False lets gradients reach the parameters, as in the model's own call.
    """

    kept = False

    def __init__(self, base: Mapping[str, Tensor], detach: bool = True) -> None:
        self.grad = detach and torch.is_grad_enabled()
        self.base = base
        self.made: dict[int, Any] = {}

    def __call__(self, copy: nn.Module, path: str) -> None:
        parameters: dict[str, Any] = copy._parameters
        given = self._replace(copy, path) if self.base else ()
        if copy._buffers:
            self._buffers(copy, given)
        if not parameters:
            return
        own_bias(copy)
        if self.grad:
            for name, p in parameters.items():
                if p is not None and p.requires_grad and name not in given:
                    parameters[name] = constant(p, copy)

    def _buffers(self, copy: nn.Module, given: Any) -> None:
        buffers, written = copy._buffers, _is_written(copy)
        weights = _packed_buffers(copy) if written else ()
        for name, b in buffers.items():
            if b is None or name in given:
                continue
            if written and name not in weights:
                buffers[name] = own_memory(b, self.made)
            elif b.requires_grad:
                buffers[name] = with_notes(b.detach(), b)

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

    def tensor_for(self, memory: Any, holder: nn.Module) -> Any:
        if id(memory) in self.made or _is_written(holder):
            return own_memory(memory, self.made)
        learned = isinstance(memory, Tensor) and memory.requires_grad
        return with_notes(memory.detach(), memory) if self.grad and learned else memory


class Frozen:
    """What a kept copy holds: parameters on the base's storage, and buffers of its own.

    The parameters are new and don't require gradients. Tied ones stay tied.

    Args:
        keep_flags: whether parameters require gradients where the base's do.
        replaced: names of tensors that others will stand for in the copy.
    """

    kept = True

    def __init__(self, keep_flags: bool = False, replaced: Container[str] = ()) -> None:
        self.replaced = replaced
        self.parameters: dict[int, Tensor] = {}
        self.made: dict[int, Any] = {}
        self.keep_flags = keep_flags

    def __call__(self, copy: nn.Module, path: str) -> None:
        parameters: dict[str, Any] = copy._parameters
        for name, p in parameters.items():
            if p is None:
                continue
            if id(p) not in self.parameters:
                self.parameters[id(p)] = parameter_like(
                    p, p.detach(), p.requires_grad and self.keep_flags
                )
            parameters[name] = self.parameters[id(p)]
        own_buffers(copy, self.made)

    def tensor_for(self, memory: Any, holder: nn.Module) -> Any:
        return own_memory(memory, self.made)


def parameter_like(p: Tensor, values: Tensor, requires_grad: bool) -> Any:
    """A parameter of the class of another and with the same attributes, on the storage of other
    values.
    """
    if type(p) is nn.Parameter or is_wrapper(p):
        made: Tensor = nn.Parameter(values, requires_grad=requires_grad)
    else:
        made = parameter_of(type(p), values, requires_grad)
    return with_notes(made, p)


def _is_written(copy: nn.Module) -> bool:
    """Whether a module's call may write on the tensors that it holds."""
    return copy.training or may_write(type(copy))


def own_memory(memory: Any, made: dict[int, Any]) -> Any:
    """A tensor or array of the tree's own, the same one wherever the base has the same one."""
    found = made.get(id(memory))
    if found is None:
        found = made[id(memory)] = _cloned(memory)
    return found


def _cloned(memory: Any) -> Any:
    if not isinstance(memory, Tensor):
        return copying.copy(memory)
    constant = memory.detach() if memory.requires_grad else memory
    return with_notes(constant.clone(), memory)


def _own_copy(t: Tensor) -> Tensor:
    """A tensor with the same values, class and flags, on memory of its own."""
    if not isinstance(t, nn.Parameter):
        return with_notes(t.clone(), t)
    return parameter_like(t, t.detach().clone(), t.requires_grad)


def own_written(
    written: Sequence[tuple[nn.Module, tuple[str, ...]]],
    model: nn.Module,
    copies: Mapping[int, nn.Module],
) -> None:
    """Give the tree copies of the parameters and buffers that its calls write on.

    Args:
        written: (a module of the base, the attributes that lead from it to a tensor).
        model: the base.
        copies: {id of a module of the base: its copy}.
    """
    for holder, (*way, name) in written:
        module: Any = holder
        for step in way:
            module = module._modules.get(step) if isinstance(module, nn.Module) else None
        if not isinstance(module, nn.Module):
            continue
        for kind in ("_parameters", "_buffers"):
            old = getattr(module, kind).get(name)
            if old is None or (kind == "_parameters" and is_packed(old)):
                continue
            new = _own_copy(getattr(copies[id(module)], kind)[name])
            for other in model.modules():  # it may have other names
                for tied, t in getattr(other, kind).items():
                    if t is old:
                        getattr(copies[id(other)], kind)[tied] = new


def _packed_buffers(copy: Any) -> tuple[str, ...]:
    """The buffers of a quantised layer that hold its weight.

    No call writes on them, and to copy them would cost what packing saves.
    """
    packed = [n for n, b in copy._buffers.items() if b is not None and is_packed(b)]
    if not packed or "weight" in copy._parameters:
        return ()
    features = getattr(copy, "in_features", None)
    if not isinstance(features, int):
        return ()
    size = features * getattr(copy, "out_features", 1)
    sizes = {name: copy._buffers[name].numel() for name in packed}
    return tuple(name for name, count in sizes.items() if count * 32 >= size and count > 1)


def constant(parameter: Tensor, copy: nn.Module) -> Tensor:
    """A parameter's values without its gradient, on the same storage; of a class of its own where
    the parameter is, and with the same attributes.
    """
    # Accelerate rebuilds the parameter from its class, so it has to be a parameter.
    if "_hf_hook" in copy.__dict__:
        return nn.Parameter(parameter.detach(), requires_grad=False)
    plain = type(parameter) is nn.Parameter
    if torch.compiler.is_dynamo_compiling() or (plain and not parameter.__dict__):
        return parameter.detach()
    inside = plain or not is_transformed() or is_wrapped(parameter)
    with nullcontext() if inside else outside_transforms():
        return with_class(parameter.detach(), parameter)


def own_bias(copy: nn.Module) -> None:
    """Give the copy of a packed layer a bias of its own.

    A packed layer may cast its bias in place to the dtype of its input (bitsandbytes).
    """
    parameters: dict[str, Any] = copy._parameters
    W, b = parameters.get("weight"), parameters.get("bias")
    if b is not None and W is not None and not W.is_floating_point():
        parameters["bias"] = b.detach()


def own_buffers(copy: nn.Module, made: dict[int, Any] | None = None) -> None:
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
            copy._buffers[name] = own_memory(b, made)
