"""What a site's copy carries: its adapters, and in a bound model their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ..core.errors import UnsupportedError
from ..core.layout import LeafSpec
from ..core.site import Params
from .attachment import Attachment

__all__ = [
    "CHILD",
    "Held",
    "Leaves",
    "SiteState",
    "Step",
    "held_by",
    "hold",
    "leaves_at",
    "leaves_of",
    "tensors_at",
    "tensors_of",
]

CHILD = "adapter"
"""The name of the child that holds the adapters' tensors in a bound site."""


class Step(Protocol):
    """The shortest way through a site's call, where only its layer and one adapter take part."""

    def __call__(self, module: Any, x: Any) -> Tensor | None:
        """The site's output, or None where the phases have to make it."""


@dataclass(eq=False)
class SiteState:
    """What a site's copy carries beside its layer's own attributes, as its attribute `_ll`.

    Attributes:
        path: the site's module.
        attachments: the adapters whose phases go around the layer's call, innermost first.
        substituted: {name of a tensor: the adapters that go into it before the layer's call}.
        inner: names of children whose tensors are substituted in this module's call (out_proj of
            attention, which torch reads without calling it).
        step: the shortest way through the call, chosen when the site is made; None: by phases.
        own_forward: the `forward` that the instance carried (accelerate's, a user's), which is the
            layer's call here.
        rebased: the call has another weight than the base's own.
    """

    path: str
    attachments: tuple[Attachment, ...] = ()
    substituted: dict[str, tuple[Attachment, ...]] = field(default_factory=dict)
    inner: tuple[str, ...] = ()
    step: Step | None = None
    own_forward: Callable[..., Any] | None = None
    rebased: bool = False


class Leaves(nn.Module):
    """The tensors of one adapter at one site of a bound model.

    Trainable tensors are parameters, and frozen ones are buffers. Where something computes one of
    them (torch.nn.utils.parametrize, prune), each call takes what it computes.
    """

    def __init__(self, tensors: Mapping[str, Tensor], specs: Mapping[str, LeafSpec]) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            if specs[name].trainable:
                self.register_parameter(name, nn.Parameter(tensor.detach()))
            else:
                self.register_buffer(name, tensor.detach())

    def own_parameters(self) -> None:
        """Take copies of the parameters, so that they share no memory with another model's."""
        for module in self.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    own = nn.Parameter(p.detach().clone(), requires_grad=False)
                    module._parameters[name] = own

    def forward(self) -> dict[str, Tensor]:
        """{lora_name: tensor}: the tensors as they are now.

        It is a dict of its own, because accelerate takes the module's own tensors away after the
        call.
        """
        return {name: getattr(self, name) for name in self.names}

    def tensors(self) -> dict[str, Tensor]:
        """{lora_name: tensor}: the tensors, wherever they are.

        They are brought back where accelerate offloaded them, and computed where they are pruned.
        """
        return (
            self()
            if "_hf_hook" in self.__dict__ or self._forward_pre_hooks
            else type(self).forward(self)
        )


class Held(nn.ModuleList):
    """The child of a bound site that holds its adapters' tensors.

    It is no part of what the site goes through in its call.
    """


def leaves_at(site: Any, slot: str) -> Leaves:
    """The tensors that a bound site holds for the adapter in that slot."""
    return site._modules[CHILD]._modules[slot]


def leaves_of(site: Any) -> Iterable[Leaves]:
    """The tensors of each adapter that a bound site holds."""
    return site._modules[CHILD]._modules.values() if CHILD in site._modules else ()


def held_by(module: Any) -> int:
    """How many adapters' tensors a bound site holds; 0 for any other module."""
    return len(module._modules.get(CHILD, ())) if hasattr(type(module), "_ll_base") else 0


def hold(site: Any, leaves: Leaves) -> None:
    """Put the tensors of one more adapter into a bound site.

    Raises:
        UnsupportedError: the layer has something of its own under the name that is needed.
    """
    if CHILD not in site._modules:
        if hasattr(site, CHILD):
            raise UnsupportedError(
                f"{type(site).__name__} has an attribute {CHILD!r}, the name that a bound site "
                f"needs for itself"
            )
        site._modules[CHILD] = Held()
    site._modules[CHILD].append(leaves)


_PLAIN_CHILDREN = frozenset({"prepared"})
"""The children of `Leaves` that compute none of its tensors."""


def tensors_at(attachment: Attachment, module: Any) -> Params:
    """The tensors of an adapter at a site."""
    p = attachment.p
    return tensors_of(leaves_at(module, attachment.slot)) if p is None else p


def tensors_of(leaves: Leaves) -> Params:
    """{lora_name: tensor}: the tensors of a bound site's adapter."""
    if not leaves._parameters or leaves._buffers or "_hf_hook" in leaves.__dict__:
        return leaves.tensors()
    if not leaves._modules.keys() <= _PLAIN_CHILDREN:
        return leaves.tensors()
    return leaves._parameters  # type: ignore[return-value]
