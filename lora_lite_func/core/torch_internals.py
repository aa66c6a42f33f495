"""What is going on around a call: transforms, tracing, autocast, a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

__all__ = [
    "at_trace_time",
    "autocasts",
    "is_ordinary",
    "is_traced",
    "is_transformed",
    "is_watched",
    "makes_graph",
    "may_overwrite",
]


def autocasts(device: str) -> bool:
    """Whether the caller's autocast reaches a type of device."""
    return device != "meta" and torch.is_autocast_enabled(device)


def at_trace_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile call `function` while it traces and take the result as a constant.

    What `torch.compiler.assume_constant_result` does, without importing the compiler (a second and
    a half) to say so.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_transform = torch._C._functorch.peek_interpreter_stack
_GRAD = torch._C._functorch.TransformType.Grad


def is_ordinary() -> bool:
    """Whether eager calls on plain tensors, and reverse mode over them, are all that is going on:
        nothing batched, no tangents, no
    nested transforms, no tracing, no autocast.
    """
    inner = _transform()
    return (
        (inner is None or (inner.level() == 1 and inner.key() == _GRAD))
        and forward_ad._current_level < 0
        and not torch._C._is_any_autocast_enabled()
        and torch._C._get_tracing_state() is None
    )


def is_traced() -> bool:
    """Whether torch.jit.trace records the call, for inputs of other sizes and for calls with and
    without a graph.
    """
    return torch.jit.is_tracing()


def makes_graph() -> bool:
    """Whether what is computed may be differentiated later, and nothing else is to be served by it."""
    return torch.is_grad_enabled() and not is_traced()


def is_transformed() -> bool:
    """Whether a transform of torch.func has a part in the call."""
    return _transform() is not None


def may_overwrite(gradient: Tensor | None = None) -> bool:
    """Whether a tensor made here may be written over in place: no graph has it, and no transform or
        compiler has a part in it.

    Args:
        gradient: in a backward pass what came in, which may be several at once
            (`is_grads_batched`), of which no transform knows.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not is_ordinary()
        or is_transformed()
    ):
        return False
    return gradient is None or not torch._C._functorch.is_legacy_batchedtensor(gradient)


def is_watched() -> bool:
    """Whether something sees each operation: a graph made of them has no number that is drawn, a
        checkpoint that keeps some nothing
    written in place.
    """
    return torch._C._len_torch_dispatch_stack() > 0
