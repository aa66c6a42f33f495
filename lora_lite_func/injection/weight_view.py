"""A site's weight as a model reads it without calling the layer (`F.linear(x, layer.weight)`): the adapted one, made when it is used.

Questions about shape, dtype or device cost nothing. While a site's own call runs, the layer sees its stored tensors.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UnsupportedError

__all__ = ["LazyWeight", "enter", "inside", "leave"]


class _Calls(threading.local):
    """The sites, by id, whose call this thread is in."""

    def __init__(self) -> None:
        self.sites: list[int] = []


_CALLS = _Calls()


def enter(site: Any) -> None:
    """A call of the site begins, in this thread; while torch.compile traces, the copy itself notes
    it.
    """
    if torch.compiler.is_compiling():
        site._ll.running += 1
    else:
        _CALLS.sites.append(id(site))


def leave(site: Any) -> None:
    """It ends."""
    if torch.compiler.is_compiling():
        site._ll.running -= 1
    else:
        _CALLS.sites.pop()


def inside(site: Any) -> bool:
    """Whether the site's own call is running."""
    if torch.compiler.is_compiling():
        return bool(site._ll.running)
    return id(site) in _CALLS.sites


class LazyWeight:
    """Stands for an adapted tensor: questions go to the stored one, any use to `make()`. It can't
    be written on.
    """

    __slots__ = ("_made", "_make", "_path", "_stored")

    def __init__(self, path: str, stored: Tensor, make: Callable[[], Any]) -> None:
        for name, value in (("_path", path), ("_stored", stored), ("_make", make), ("_made", None)):
            object.__setattr__(self, name, value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, named = getattr(func, "__name__", ""), kwargs or {}
        targets = [
            named.get("out"),
            *((*args[:1], named.get("tensor"), named.get("input")) if _writes(name) else ()),
        ]
        for value in targets:
            if type(value) is LazyWeight:
                raise _read_only(value, name)
        return func(*_made(args), **_made(kwargs or {}))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        caller = sys._getframe(1).f_globals.get(
            "__name__"
        )  # these two hand what is a tensor to C++, which takes their word for it
        if caller == "torch.utils.checkpoint":
            return LazyWeight
        if caller == "torch._functorch.utils":
            raise UnsupportedError(
                f"{self._path!r} is the weight with an adapter in, made when it is used, and a "
                f"torch.autograd.Function (a fused kernel, "
                "reentrant checkpointing) takes finished tensors; leave the layer out with "
                "exclude_names, checkpoint with "
                "use_reentrant=False, or merge (ll.merged; in training ll.functional_call(model, "
                "(), args, base=ll.merge(model, params)))"
            )
        return type(self._stored)

    @property
    def grad_fn(self) -> Any:
        """Never None, so that no module takes it for a parameter of its own."""
        return _tensor(self).grad_fn or "an adapter"

    def __getattr__(self, name: str) -> Any:
        if name in _ASKED:
            return getattr(self._stored, name)
        if name == "data" or _writes(name):
            raise _read_only(self, name)
        return getattr(_tensor(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _read_only(self, name)

    def __repr__(self) -> str:
        return repr(_tensor(self))


_ASKED = frozenset(
    {
        "dtype",
        "shape",
        "device",
        "layout",
        "ndim",
        "dim",
        "size",
        "stride",
        "numel",
        "element_size",
        "itemsize",
        "nbytes",
    }
)
_ASKED |= {
    "requires_grad",
    "is_meta",
    "is_cuda",
    "is_cpu",
    "is_sparse",
    "is_quantized",
    "is_floating_point",
    "is_complex",
    "_is_param",
}


def _writes(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _read_only(value: LazyWeight, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{value._path!r} is the weight with an adapter in, made when it is read, so {name!r} "
        f"would be lost or go round the adapter; "
        "the stored one is in named_parameters() and state_dict()"
    )


def _tensor(value: LazyWeight) -> Tensor:
    # made for each use: a block that is run again in the backward pass must find what its first run
    # found
    if torch.is_grad_enabled():
        return value._make()
    if value._made is None:
        object.__setattr__(value, "_made", value._make())
    return value._made


def _made(value: Any) -> Any:
    """Every stand-in among arguments replaced by its tensor."""
    if type(value) is LazyWeight:
        return _tensor(value)
    if type(value) in (list, tuple):
        return type(value)(map(_made, value))
    if type(value) is dict:
        return {k: _made(v) for k, v in value.items()}
    return value


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(_tensor(self), name)(*_made(args))


_BOTH = ("matmul", "mul", "add", "sub", "truediv", "pow")
for _name in (
    *_BOTH,
    *(f"r{n}" for n in _BOTH),
    "getitem",
    "neg",
    "abs",
    "len",
    "iter",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "bool",
    "float",
    "int",
):
    setattr(LazyWeight, f"__{_name}__", _operator(f"__{_name}__"))
LazyWeight.__hash__ = object.__hash__  # type: ignore[method-assign]
