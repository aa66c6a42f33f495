"""What a prepared model made once of its adapters' tensors, site by site: good while those are the very tensors, unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .ops import Op, leaves_of

__all__ = ["Ready", "kept", "moved", "ready_at", "stamped"]


class Ready(NamedTuple):
    """What a site's adapters need in every call, made once.

    Attributes:
        made: {slot: (`prepare`'s d or None, `factors`' triple or None)}.
        of: the site's tensors, its adapters' and its own, that it was made of.
        versions: of those; in-place writes move them.
    """

    made: Mapping[int, tuple[Any, Any]]
    of: tuple[Any, ...]
    versions: tuple[int, ...]


def stamped(site: Any, made: Mapping[int, tuple[Any, Any]]) -> Ready | None:
    """`made` with the tensors that it is of; None if there is nothing, or writes on them couldn't be seen."""
    of = tuple(_sources(site))
    if not made or any(t is not None and t.is_inference() for t in of):
        return None
    return Ready(made, of, tuple(0 if t is None else t._version for t in of))


def ready_at(op: Op, module: Any) -> tuple[Any, Any] | None:
    """What was made of an adapter's tensors at a site; None where a call makes it: because nothing was, or they aren't what they were
    (loaded, replaced for a call, written on, put away), or are to be trained."""
    if op.p is not None or module.training:
        return None
    ready = module._ll_ready
    found = None if ready is None else ready.made.get(op.slot)
    return found if found is None or torch.compiler.is_compiling() or _unchanged(module, ready) else None


def moved(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """A site's `_apply`: what was made goes to other devices with its tensors; in another dtype calls make it again."""
    ready = self._ll_ready
    good = ready is not None and _unchanged(self, ready)
    before = _dtypes(_sources(self))
    self._ll_base._apply(self, fn, recurse)
    same = good and before == _dtypes(_sources(self))
    self.__dict__["_ll_ready"] = stamped(self, pytree.tree_map_only(Tensor, fn, ready.made)) if same else None
    return self


def kept(site: Any) -> Mapping[int, tuple[Any, Any]] | None:
    """What a copy of a site (pickled, deep) may take with it."""
    ready = site._ll_ready
    return ready.made if ready is not None and _unchanged(site, ready) else None


def _unchanged(site: Any, ready: Ready) -> bool:
    """Whether a site's tensors are those that `ready` was made of, unwritten, and nothing is to be learned about them."""
    found, learns = _sources(site), torch.is_grad_enabled()
    for t, old, version in zip(found, ready.of, ready.versions, strict=False):
        if t is not old or (t is not None and (t.is_inference() or t._version != version or (learns and t.requires_grad))):
            return False
    return len(found) == len(ready.of)


def _sources(site: Any) -> list[Tensor | None]:
    found: list[Any] = [*site._parameters.values()]
    for leaves in leaves_of(site):
        found += leaves._parameters.values()
        found += leaves._buffers.values()
    return found


def _dtypes(tensors: Iterable[Tensor | None]) -> list[Any]:
    return [None if t is None else t.dtype for t in tensors]
