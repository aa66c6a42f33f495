"""A plain object that stands for the layer of a site while the site's own call runs.

It is of the layer's own class, so code that reads `weight` on it gets the stored tensor, where the
site itself would give the adapted one. Nothing global is changed, so calls in other threads, and
calls that torch.compile leaves to Python in the middle of a graph, can't disturb each other.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..core.torch_internals import attributes_of
from .rebinding import turn_callables
from .references import shallow_copy

__all__ = ["delegated", "on_stand_in"]

Call = Callable[[Any, Callable[..., Any]], Any]


def on_stand_in(site: Any, cls: type[nn.Module], call: Call) -> Any:
    """The result of `call(stand-in, the layer's call)`.

    What the layer notes on itself during the call stays noted on the site.

    Args:
        site: a site's copy.
        cls: the class of the stand-in.
        call: the site's own call.
    """
    # A list of layers has no weight of its own, and a site of it goes through its layers itself.
    if site._ll_is_list:
        return call(site, site._ll_layer_call)
    compiled = torch.compiler.is_dynamo_compiling()
    if site._ll_shares_dict and not compiled and not _has_own_call(site):
        made = _sharing(site, cls)
        return call(made, made.forward)
    made = _copy(site, cls)
    before = dict(attributes_of(made))
    if compiled:
        result = call(made, made.forward)
        _note(site, made, before)
        return result
    try:
        return call(made, made.forward)
    finally:
        _note(site, made, before)


def delegated(cls: type[nn.Module]) -> dict[str, Any]:
    """What a layer's class has beyond nn.Module, for a site that is no instance of that class.

    Methods and properties work on a stand-in of the layer's class, which shares the site's
    attributes.
    """
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__[: cls.__mro__.index(nn.Module)]):
        for name, value in vars(base).items():
            if not name.startswith(("__", "_ll_")) and name != "forward":
                found[name] = _delegate(name, value)
    return found


def _delegate(name: str, value: Any) -> Any:
    if isinstance(value, property):
        return property(lambda site: getattr(_sharing(site, site._ll_base), name))
    if not isinstance(value, types.FunctionType):
        return value

    @functools.wraps(value)
    def call(site: Any, *args: Any, **kwargs: Any) -> Any:
        made = _sharing(site, site._ll_base)
        result = getattr(made, name)(*args, **kwargs)
        return site if result is made else result

    return call


def _sharing(site: Any, cls: type[nn.Module]) -> Any:
    """An object of a class with the site's very attributes."""
    made = object.__new__(cls)
    object.__setattr__(made, "__dict__", site.__dict__)
    return made


def _has_own_call(site: Any) -> bool:
    """Whether an instance's own forward is the layer's call, or goes around the site's."""
    return site._ll.own_forward is not None or "forward" in site.__dict__


def _copy(site: Any, cls: type[nn.Module]) -> Any:
    """A shallow copy of the site with the layer's call as its forward."""
    made = shallow_copy(site, cls)
    attributes, own = made.__dict__, site._ll.own_forward
    if "forward" in attributes:
        del attributes["forward"]
    if site._ll_substitutes:
        attributes["forward"] = site._ll_layer_call
    elif own is not None:
        # The forward that the instance carried, and whatever is bound to it, works on this one.
        attributes["forward"] = own
        turn_callables(made, {id(site): made})
    return made


def _note(site: Any, made: Any, before: dict[str, Any]) -> None:
    for name, value in attributes_of(made).items():
        if before.get(name, before) is not value:
            site.__dict__[name] = value
