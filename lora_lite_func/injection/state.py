"""Where a bound site holds its adapters' tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.errors import UnsupportedError
from ..core.layout import LeafSpec
from ..core.site import Params
from .attachment import Attachment

__all__ = [
    "Held",
    "Leaves",
    "held_by",
    "hold",
    "leaves_at",
    "leaves_of",
    "parameters_of",
    "tensors_at",
]

_CHILD = "adapter"  # the name under which a bound site holds its adapters' tensors


class Leaves(nn.Module):
    """The tensors of one adapter at one site of a bound model: trainable ones as parameters, frozen
        ones as buffers.

    What computes one of them (torch.nn.utils.parametrize, prune) is heeded in each call.
    """

    def __init__(self, tensors: Mapping[str, Tensor], specs: Mapping[str, LeafSpec]) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            if specs[name].trainable:
                self.register_parameter(name, nn.Parameter(tensor.detach()))
            else:
                self.register_buffer(name, tensor.detach())

    def forward(self) -> dict[str, Tensor]:
        """{lora_name: tensor}, as it is now: accelerate puts the module's own away again after the
        call.
        """
        return {name: getattr(self, name) for name in self.names}

    def tensors(self) -> dict[str, Tensor]:
        """{lora_name: tensor}, brought from where accelerate put them away, if it did, or made by
        what prunes them.
        """
        return (
            self()
            if "_hf_hook" in self.__dict__ or self._forward_pre_hooks
            else Leaves.forward(self)
        )


def parameters_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own parameters; of a replica that torch.nn.DataParallel made, which has none, the
    tensors that stand for them.
    """
    stand_ins: dict[str, Tensor | None] | None = module.__dict__.get("_former_parameters")
    return {**module._parameters, **stand_ins} if stand_ins else module._parameters  # type: ignore[return-value]


class Held(nn.ModuleList):
    """The child of a bound site with its adapters' tensors: no part of what the site goes through
    in its call.
    """


def leaves_at(site: Any, index: int) -> Leaves:
    """The tensors that a bound site holds for its `index`-th adapter."""
    return site._modules[_CHILD]._modules[str(index)]


def leaves_of(site: Any) -> Iterable[Leaves]:
    """The tensors of each adapter that a bound site holds."""
    return site._modules[_CHILD]._modules.values() if _CHILD in site._modules else ()


def held_by(module: Any) -> int:
    """How many adapters' tensors a bound site holds; 0 for any other module."""
    return len(module._modules.get(_CHILD, ())) if hasattr(type(module), "_ll_base") else 0


def hold(site: Any, leaves: Leaves) -> None:
    """Put one more adapter's tensors into a bound site.

    Raises:
        UnsupportedError: the layer has something of its own under the name needed.
    """
    if _CHILD not in site._modules:
        if hasattr(site, _CHILD):
            raise UnsupportedError(
                f"{type(site).__name__} has an attribute {_CHILD!r}, the name that a bound site "
                f"needs for itself"
            )
        site._modules[_CHILD] = Held()
    site._modules[_CHILD].append(leaves)


def tensors_at(attachment: Attachment, module: Any) -> Params:
    """The tensors of an adapter at a site."""
    if attachment.p is not None:
        return attachment.p
    leaves = leaves_at(module, attachment.slot)
    simple = (
        leaves._parameters
        and not leaves._buffers
        and not leaves._modules
        and "_hf_hook" not in leaves.__dict__
    )
    return leaves._parameters if simple else leaves.tensors()  # type: ignore[return-value]
