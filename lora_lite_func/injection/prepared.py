"""What a prepared model made once of its adapters' tensors, site by site: good while those are the very tensors, unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .attachment import Attachment
from .state import leaves_of

__all__ = ["Ready", "kept", "moved", "ready_at", "replicated", "stamped"]


class Ready(NamedTuple):
    """What a site's adapters need in every call, made once.

    Attributes:
        made: {slot: (`prepare`'s d or None, `factors`' triple or None)}.
        of: the site's tensors, its adapters' and its own, that it was made of: (the dict that holds
            it, its name there, it, its version, which in-place writes move).
    """

    made: Mapping[int, tuple[Any, Any]]
    of: tuple[tuple[Mapping[str, Any], str, Tensor, int], ...]


def stamped(site: Any, made: Mapping[int, tuple[Any, Any]]) -> Ready | None:
    """`made` with the tensors that it is of; None if there is nothing, or writes on them couldn't
    be seen.
    """
    of = list(_sources(site))
    if not made or any(t.is_inference() for _, _, t in of):
        return None
    return Ready(made, tuple((held, name, t, t._version) for held, name, t in of))


def ready_at(attachment: Attachment, module: Any) -> tuple[Any, Any] | None:
    """What was made of an adapter's tensors at a site; None where a call makes it: because nothing
    was, or they aren't what they were (loaded, replaced for a call, written on, put away), or are
    to be trained.
    """
    if attachment.p is not None or module.training:
        return None
    ready = module._ll_ready
    found = None if ready is None else ready.made.get(attachment.slot)
    return found if found is None or torch.compiler.is_compiling() or _unchanged(ready) else None


def moved(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """A site's `_apply`: what was made goes to other devices with its tensors; in another dtype
    calls make it again.
    """
    ready = self._ll_ready
    good = ready is not None and _unchanged(ready)
    before = [t.dtype for _, _, t in _sources(self)]
    self._ll_base._apply(self, fn, recurse)
    same = good and before == [t.dtype for _, _, t in _sources(self)]
    self.__dict__["_ll_ready"] = (
        stamped(self, pytree.tree_map_only(Tensor, fn, ready.made)) if same else None
    )
    return self


def replicated(self: Any) -> Any:
    """A site's `_replicate_for_data_parallel`: the replica, on a device of its own, makes
    everything in each call.
    """
    replica = self._ll_base._replicate_for_data_parallel(self)
    replica.__dict__["_ll_ready"] = None
    return replica


def kept(site: Any) -> Mapping[int, tuple[Any, Any]] | None:
    """What a copy of a site (pickled, deep) may take with it."""
    ready = site._ll_ready
    return ready.made if ready is not None and _unchanged(ready) else None


def _unchanged(ready: Ready) -> bool:
    """Whether the tensors are those that `ready` was made of, unwritten, and nothing is to be
    learned about them.
    """
    try:
        for held, name, t, version in ready.of:
            if held[name] is not t or t._version != version:
                return False
    except (
        KeyError,
        RuntimeError,
    ):  # taken out, or moved under inference_mode, where no version is kept
        return False
    return not torch.is_grad_enabled() or not any(t.requires_grad for _, _, t, _ in ready.of)


def _sources(site: Any) -> Iterator[tuple[Mapping[str, Any], str, Tensor]]:
    holders = [site._parameters]
    for leaves in leaves_of(site):
        holders += [leaves._parameters, leaves._buffers]
    return ((held, name, t) for held in holders for name, t in held.items() if t is not None)
