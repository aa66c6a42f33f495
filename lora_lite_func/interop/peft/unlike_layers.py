"""Layers of which PEFT computes something else than a change of their weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...core.torch_internals import CONVOLUTIONS
from .codec import Codec

__all__ = ["unlike"]


def unlike(path: str, modules: Mapping[str, Any], method: Codec, *, written: bool) -> str | None:
    """Return why PEFT's outputs with an adapter of this module aren't those of the changed weight,
    and what to do; None where they are.

    Args:
        path: the module's.
        modules: the base's, by path.
        method: the file's method.
        written: whether the file is written here, and not read.
    """
    parent = path if path in modules else path.rpartition(".")[0]  # of a bare parameter
    other = _other_place(parent, modules)
    if other is not None:
        return (
            f"its module is {other!r} too, and PEFT adapts it in one of these places alone; give "
            f"each place a module of its own (copy.deepcopy), or "
        )
    module = modules.get(path)
    if isinstance(module, CONVOLUTIONS):
        return _convolution(module, method, written)
    if getattr(module, "max_norm", None) is not None:
        return (
            "PEFT shortens the rows of its table (max_norm) before the update is added, and "
            "here the changed row is shortened; set max_norm to None, or "
        )
    return None


def _other_place(path: str, modules: Mapping[str, Any]) -> str | None:
    """Return another path of the same module under another parent or name. PEFT replaces a module
    where it finds it first.
    """
    module = modules.get(path)
    if module is None:
        return None
    parent, _, leaf = path.rpartition(".")
    for other, candidate in modules.items():
        above, _, name = other.rpartition(".")
        if candidate is module and (name != leaf or modules.get(above) is not modules.get(parent)):
            return other
    return None


def _convolution(module: Any, method: Codec, written: bool) -> str | None:
    cls: Any = getattr(type(module), "_ll_base", type(module))  # underneath a bound model's site
    own: Any = next(c for c in cls.__mro__ if c.__module__ == "torch.nn.modules.conv")
    if cls.forward is not own.forward or cls._conv_forward is not own._conv_forward:
        return (
            f"a {cls.__name__} does more than a convolution, around which PEFT adds its update; "
            f"leave it out, or "
        )
    if not method.convolves or all(n == 1 for n in module.kernel_size):
        return None
    pads = isinstance(module.padding, str) or any(module.padding)
    if pads and module.padding_mode != "zeros":
        return (
            f"PEFT's update is of an input padded with zeros, and this convolution pads it by "
            f"{module.padding_mode!r}; pad before it (nn.ReflectionPad2d and its like), or "
        )
    # where a file is read, a PEFT that knew of no dilation couldn't have trained it
    told = isinstance(module.padding, str) or written
    if method.undilated and told and any(n != 1 for n in module.dilation):
        return (
            f"PEFT's {method.peft_type} doesn't spread its update as this convolution's dilation "
            f"does; "
        )
    return None
