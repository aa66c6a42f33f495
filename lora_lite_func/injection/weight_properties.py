"""Properties of a site's class: `weight` and the like for code that reads them without a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.torch_internals import parameters_of, with_class
from ..layers.weights import is_packed
from .called_linears import uncalled
from .checks import check_training
from .dense_weight import merge_site
from .rows_weight import Chains
from .state import tensors_at
from .weight_route import Tensors, adapted, chains_of
from .weight_view import lazily, waits

__all__ = ["read", "read_substituted"]


def read(name: str) -> property:
    """A property: `site.weight` or `.bias` for code that reads it without calling the layer.

    Reading it gives the adapted tensor. It raises AttributeError where the layer has none.

    Raises:
        UnsupportedError: the tensor is written on, or taken out.
    """

    def get(self: Any) -> Any:
        found = _own(self, name)
        if found is _NONE:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        weight = _own(self, "weight")
        if not isinstance(weight, Tensor) or is_packed(weight) or weight.is_meta:
            # A packed or offloaded tensor is nothing that an adapter could go into.
            return found
        bias = _own(self, "bias")
        stored = {"weight": weight, "bias": None if bias is _NONE else bias}
        return _read(self, name, {("", "weight"): self._ll.attachments}, stored, _merged)

    return property(get, _putting(name), _refusing(name))


def _merged(module: Any, chains: Chains, stored: Tensors) -> Tensors:
    (attachments,) = chains.values()
    check_training(module, attachments)
    W = stored["weight"]
    assert W is not None
    merged, bias = merge_site(module, attachments, W, stored["bias"])
    return {"weight": with_class(merged, W), "bias": bias}


def read_substituted(name: str) -> property:
    """A property: a substituted tensor for code that reads it without calling the module."""

    def get(self: Any) -> Any:
        chains = {key: chain for key, chain in chains_of(self).items() if not key[0]}
        return _read(self, name, chains, parameters_of(self), adapted)

    return property(get, _putting(name), _refusing(name))


def _read(
    self: Any,
    name: str,
    chains: Chains,
    stored: Tensors,
    with_adapters: Callable[[Any, Chains, Tensors], Tensors],
) -> Any:
    """A tensor of a site with its adapters in, made now or when it is used."""
    found = stored.get(name)
    if found is None or not waits(found):
        return with_adapters(self, chains, stored).get(name, found)
    names = [n for n, t in stored.items() if t is not None]
    leaves = [tensors_at(attachment, self) for chain in chains.values() for attachment in chain]

    def make(*tensors: Tensor) -> Tensor:
        if any(attachment.called for chain in chains.values() for attachment in chain):
            raise uncalled(self._ll.path)
        it = iter(tensors)
        given = {**stored, **{n: next(it) for n in names}}
        filled = iter([{key: next(it) for key in p} for p in leaves])
        own = {
            key: tuple(attachment.changed(p=next(filled)) for attachment in chain)
            for key, chain in chains.items()
        }
        made = with_adapters(self, own, given).get(name, given[name])
        assert made is not None
        return made

    tensors = [t for n in names if (t := stored[n]) is not None]
    tensors += [t for p in leaves for t in p.values()]
    path = f"{self._ll.path}.{name}" if self._ll.path else name
    return lazily(path, found, tensors, make)


def _putting(name: str) -> Callable[[Any, Any], None]:
    """The setter of such a tensor where it is no parameter.

    A hook that computes the tensor sets it, or a replica sets its stand-in.
    """

    def put(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return put


def _refusing(name: str) -> Callable[[Any], None]:
    """The deleter of such a tensor: it refuses to take the tensor out of a site.

    Raises:
        UnsupportedError: always, with what to do instead.
    """

    def drop(self: Any) -> None:
        raise UnsupportedError(
            f"{self._ll.path!r} ({self._ll_base.__name__}): its {name} is part of what its "
            f"adapter makes, so it can't be taken out, as FullyShardedDataParallel does; shard "
            f"with torch.distributed.fsdp.fully_shard(ll.bind(model, params))"
        )

    return drop


_NONE = object()


def _own(self: Any, name: str) -> Any:
    """A layer's tensor as the layer sees it.

    It is computed by a property of the layer's own class, stored, or set on the layer by a hook.
    """
    attributes = self.__dict__
    if name in self._ll_computed:
        return getattr(self._ll_base, name).__get__(self)
    if name in attributes["_parameters"]:
        return attributes["_parameters"][name]
    if name in attributes:
        return attributes[name]
    if name in attributes["_buffers"]:
        return attributes["_buffers"][name]
    return _NONE
