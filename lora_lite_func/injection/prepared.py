"""What a prepared model makes once, site by site, from its adapters' tensors.

It is used while the tensors are the same objects, unchanged. Otherwise each call makes it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..core.torch_internals import is_tracing_here
from .state import Leaves, leaves_at, leaves_of

__all__ = ["Made", "keep", "ready_of"]


Source = tuple[Mapping[str, Any], str, Tensor]
"""(the dict that holds a tensor, its name there, the tensor)"""


class Made(NamedTuple):
    """What one adapter needs in every call at a site.

    Attributes:
        d: what the method's `prepare` gave, or None.
        factors: what its `low_rank_factors` gave, or None.
    """

    d: Any
    factors: Any


class _Sources:
    """The tensors that something was made from: their holders, names and states.

    A copy of the model (deep or pickled) takes its own tensors as the sources. What was made goes
    with the copy, if it was valid when it was copied.
    """

    __slots__ = ("moved", "stamps")

    def __init__(self, held: Iterable[Source], good: bool = True) -> None:
        self.stamps = tuple((*source, source[2]._version, source[2].dtype) for source in held)
        self.stamps = self.stamps if good else ()
        self.moved = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _Sources, (tuple(stamp[:3] for stamp in self.stamps), self.unchanged())

    def unchanged(self) -> bool:
        """Whether the tensors are the same objects, unwritten, of the same dtype, and frozen."""
        try:
            for holder, name, t, version, dtype in self.stamps:
                if holder[name] is not t:
                    return self.moved and self._stamped_again()
                if t._version != version or t.dtype is not dtype:
                    return False
        except (KeyError, RuntimeError):
            # The tensor was taken out, or it was made in inference mode, which keeps no version.
            return False
        if torch.is_grad_enabled() and any(stamp[2].requires_grad for stamp in self.stamps):
            return False
        return bool(self.stamps)

    def _stamped_again(self) -> bool:
        """Stamp the sources again after a move to another device.

        The buffers are new tensors then, which nobody has written on.
        """
        self.moved = False
        found = []
        for holder, name, t, version, dtype in self.stamps:
            now = holder[name]
            if now.dtype is not dtype or now._version != (version if now is t else 0):
                return False
            found.append((holder, name, now, now._version, dtype))
        self.stamps = tuple(found)
        return self.unchanged()


class Prepared(nn.Module):
    """What was made for one adapter at one site.

    It is a child of the adapter's leaves, so that it moves with them.
    """

    def __init__(self, made: Made, sources: _Sources) -> None:
        super().__init__()
        self.made: Made | None = made
        self.sources = sources

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Prepared:
        self.sources.moved = self.sources.unchanged()
        self.made = pytree.tree_map_only(Tensor, fn, self.made)
        return self

    def forget(self, *_: Any) -> None:
        """Forget what was made.

        A compiled call doesn't see writes on tensors, but it does see this.
        """
        self.made = None


def keep(site: Any, made: Mapping[str, Made]) -> None:
    """Let a bound site keep what was made for its adapters, {slot: Made}.

    Nothing is kept where writes on the tensors couldn't be seen (inference tensors).
    """
    held = _tensors_of(site)
    if any(t.is_inference() for _, _, t in held):
        return
    sources = _Sources(held)
    for slot, one in made.items():
        prepared = Prepared(one, sources)
        leaves = leaves_at(site, slot)
        leaves.prepared = prepared
        for module in (site, leaves):
            module.register_load_state_dict_post_hook(_forget)


def _forget(module: Any, incompatible: Any) -> None:
    """Forget what was made, after a state dict was loaded into a site or its leaves."""
    for leaves in (module,) if isinstance(module, Leaves) else leaves_of(module):
        prepared = leaves._modules.get("prepared")
        if isinstance(prepared, Prepared):
            prepared.forget()


def ready_of(leaves: Leaves) -> Made | None:
    """What was made from leaves in evaluation mode; None where a call has to make it.

    A call has to make it where nothing was kept, where the tensors aren't what they were (loaded,
    replaced for a call, written on, offloaded, of another dtype), and where they are to be trained.
    """
    prepared: Any = leaves._modules.get("prepared")
    if prepared is None or prepared.made is None:
        return None
    if is_tracing_here() or prepared.sources.unchanged():
        return prepared.made
    return None


def _tensors_of(site: Any) -> list[Source]:
    """A site's own parameters and all tensors that its adapters hold, each with its holder."""
    holders = [site._parameters]
    for leaves in leaves_of(site):
        holders += [leaves._parameters, leaves._buffers]
    return [(held, name, t) for held in holders for name, t in held.items() if t is not None]
