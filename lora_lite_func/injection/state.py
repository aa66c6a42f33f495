"""What a site's copy carries: its adapters, and in a bound model their tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from ..core.errors import UnsupportedError
from ..core.layout import LeafSpec
from ..core.shared import Once
from ..core.site import Params
from .attachment import Attachment

__all__ = [
    "CHILD",
    "Held",
    "Leaves",
    "SiteState",
    "Step",
    "count_held",
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
    """What a site's copy carries besides its layer's own attributes, as its attribute `_ll`.

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

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        specs: Mapping[str, LeafSpec],
        shared: Mapping[str, nn.Parameter] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            tensors: {lora_name: tensor}.
            specs: what is known of each.
            shared: the trainable ones that other sites hold too.
        """
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            if not specs[name].trainable:
                self.register_buffer(name, tensor.detach())
            elif name in shared:
                self.register_parameter(name, shared[name])
            else:
                self.register_parameter(name, nn.Parameter(tensor.detach()))

    def own_parameters(self, made: dict[int, nn.Parameter]) -> None:
        """Take copies of the parameters, so that they share no memory with another model's.

        Args:
            made: {id of a parameter: its copy}, of all that have been copied.
        """
        for module in self.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    if id(p) not in made:
                        made[id(p)] = nn.Parameter(p.detach().clone(), requires_grad=False)
                    module._parameters[name] = made[id(p)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Leaves:
        """Move or cast the tensors, as `nn.Module` does. Parameters that several sites have stay
        one, and buffers that they have in one memory stay so.
        """
        before, shared = dict(self._buffers), dict(self._parameters)
        super()._apply(fn, recurse)
        once = _results_of(fn)
        for name, p in shared.items():
            new: Any = self._parameters[name]
            if new is not p:
                self._parameters[name] = once.of_object(p, new)
        for name, t in before.items():
            now = self._buffers[name]
            found = once(lambda _, now=now: now, t, key=None if t is None else t._version)
            # each has an object of its own: torch takes one object for tied tensors
            self._buffers[name] = found if found is now or found is None else found.detach()
        return self

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


_RESULTS: weakref.WeakKeyDictionary[Any, Once] = weakref.WeakKeyDictionary()


def _results_of(fn: Callable[[Tensor], Tensor]) -> Once:
    """What a function gave so far for buffers that share memory. A call of `to`, `half` and the
    like takes one function of its own through all modules; what is kept for one that lives longer
    would live as long.
    """
    if "<locals>" not in getattr(fn, "__qualname__", ""):
        return Once()
    try:
        return _RESULTS.setdefault(fn, Once())
    except TypeError:  # such a function has no weak references
        return Once()


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


def count_held(module: Any) -> int:
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
