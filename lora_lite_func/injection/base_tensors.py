"""What a copied tree holds of the base's tensors: constants for a call, parameters for a kept copy.

Nothing here writes on the base, and no gradient reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.torch_internals import is_wrapper
from ..layers.weights import is_packed
from .written import may_write

__all__ = [
    "BaseTensors",
    "Constants",
    "Frozen",
    "constant",
    "own_bias",
    "own_buffers",
    "own_written",
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

    made: dict[int, Tensor]
    """{id of a tensor of the base: the tree's own one, which is cloned from it}."""

    def beside(self, tensor: Tensor, holder: nn.Module) -> Tensor:
        """What stands for a tensor that a module holds beside its parameters and buffers.

        Args:
            tensor: the module's tensor.
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
        self.made: dict[int, Tensor] = {}

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

    def beside(self, tensor: Tensor, holder: nn.Module) -> Tensor:
        if id(tensor) in self.made or _is_written(holder):
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

    def beside(self, tensor: Tensor, holder: nn.Module) -> Tensor:
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


def _is_written(copy: nn.Module) -> bool:
    """Whether a module's call may write on the tensors that it holds."""
    return copy.training or may_write(type(copy))


def _clone(tensor: Tensor, made: dict[int, Tensor]) -> Tensor:
    """A tensor of the tree's own, the same one wherever the base has the same one."""
    found = made.get(id(tensor))
    if found is None:
        constant = tensor.detach() if tensor.requires_grad else tensor
        found = made[id(tensor)] = constant.clone()
    return found


def _own_copy(t: Tensor) -> Tensor:
    """A tensor with the same values, class and flags, on memory of its own."""
    if not isinstance(t, nn.Parameter):
        return t.clone()
    made = _parameter(t, t.requires_grad)
    made.data = t.detach().clone()
    return made


def own_written(
    written: Sequence[tuple[nn.Module, tuple[str, ...]]],
    model: nn.Module,
    copies: Mapping[int, nn.Module],
) -> None:
    """Give the tree its own ones of the parameters and buffers that its calls write on.

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
