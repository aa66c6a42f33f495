"""Models that cannot be adapted, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..core.errors import UnsupportedError
from ..core.torch_internals import at_trace_time, is_compiled
from ..core.weak_memo import WeakMemo

__all__ = ["check_model", "refusal", "refuse_uncopyable"]


def _refusal(cls: type) -> str | None:
    module_names = [base.__module__ for base in cls.__mro__]
    if issubclass(cls, torch.jit.ScriptModule):
        return (
            "is a TorchScript module, whose calls can't be changed; give the nn.Module it was "
            "made from"
        )
    if issubclass(cls, nn.modules.lazy.LazyModuleMixin) and cls.cls_to_become is not None:
        return "is lazy and hasn't its sizes yet; call the model once on an example, then use it"
    if is_compiled(cls):
        return (
            "is the result of torch.compile, which holds on to the original; give that one "
            "(`compiled._orig_mod`) and compile the call: "
            "torch.compile(lambda params, x: ll.apply(model, params, x))"
        )
    if any(n.startswith(("torch.distributed.fsdp", "torch.nn.parallel")) for n in module_names):
        return (
            "spreads its module over devices or processes; bind first, then wrap: "
            "DistributedDataParallel(ll.bind(model, params)), fully_shard(ll.bind(model, params))"
        )
    if any(_is_of_peft(base) for base in cls.__mro__):
        return (
            "is PEFT's, which has an adapter in it already; give the base without PEFT's layers "
            "(peft_model.unload(), or the base loaded anew) and take the adapter from its folder: "
            "ll.from_peft(folder, model)"
        )
    return None


def _is_of_peft(cls: type) -> bool:
    """Whether a class is a wrapper of PEFT's: of a model, a layer, a module trained whole."""
    name = cls.__name__
    if name in ("BaseTuner", "BaseTunerLayer", "AuxiliaryTrainingWrapper"):
        return cls.__module__.startswith("peft.")
    return cls.__module__ == "peft.peft_model" and name == "PeftModel"


_REFUSALS = WeakMemo(_refusal)


@at_trace_time
def refusal(cls: type) -> str | None:
    """Why modules of a class can't be copied, and what to do instead; None if they can."""
    return _REFUSALS(cls)


def check_model(model: Any) -> None:
    """Refuse anything that isn't a model.

    Raises:
        UnsupportedError: it isn't one; the message says what was found.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise UnsupportedError(
            f"expected an nn.Module, found the class {model.__name__} itself; give an instance "
            f"of it"
        )
    raise UnsupportedError(f"expected an nn.Module, found {type(model).__name__}")


def refuse_uncopyable(model: nn.Module) -> None:
    """Refuse a model with a part that can't be copied.

    Raises:
        UnsupportedError: there is such a part; the message gives its path and what to do instead.
    """
    for path, module in model.named_modules():
        reason = refusal(type(module))
        if reason is not None:
            raise UnsupportedError(f"{path!r} ({type(module).__name__}) {reason}")
