"""x W'^T + b' for an adapted weight W' that isn't saved but made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.torch_internals import without_saved_hooks

__all__ = ["recomputed_linear"]

Make = Callable[..., tuple[Tensor, Tensor | None]]
"""Tensors to (W' (d_out, d_in), b' (d_out,) or None); draws nothing at random."""


def recomputed_linear(make: Make, x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """x W'^T + b', (..., d_out), where W', b' = make(*tensors); gradients reach x and the tensors.

    Args:
        make: a function of the tensors alone; anything else it reads is a constant.
        x: (..., d_in).
        tensors: everything that W' and b' depend on.
    """
    flat = x if x.ndim <= 2 else x.flatten(0, -2)  # (T, d_in)
    y: Tensor = _RecomputedLinear.apply(make, flat, *tensors)
    # The view is made outside: autograd forbids writing on a view that a function returns.
    return y if flat is x else y.view(*x.shape[:-1], y.shape[-1])


class _RecomputedLinear(torch.autograd.Function):
    """`recomputed_linear` of an x (T, d_in)."""

    @staticmethod
    def forward(make: Make, x: Tensor, *tensors: Tensor) -> Tensor:
        return F.linear(x, *make(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.make = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        to_x, *to = ctx.needs_input_grad[1:]
        learned = [t for t, needed in zip(tensors, to, strict=True) if needed]
        W, pull = _pullback(ctx.make, tensors, to) if learned else (ctx.make(*tensors)[0], None)
        dx = g @ W if to_x else None
        if pull is None:
            return None, dx, *(None for _ in tensors)
        G = g.reshape(-1, g.shape[-1])  # (T, d_out)
        dW = G.mT @ x.reshape(-1, x.shape[-1])  # (d_out, d_in)
        back = iter(pull(dW, G))
        return None, dx, *(next(back) if needed else None for needed in to)


Pull = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""(dW (d_out, d_in), G (T, d_out), the gradient of y) to the gradients of the learned tensors."""


def _pullback(make: Make, tensors: Sequence[Tensor], to: Sequence[bool]) -> tuple[Tensor, Pull]:
    """W', made again, and the map from its gradient and b''s to those of what `to` marks.

    The map is a torch.func.vjp, which can itself be differentiated.
    """

    def again(*learned: Tensor) -> tuple[Tensor, ...]:
        these = iter(learned)
        W, b = make(*(next(these) if needed else t for t, needed in zip(tensors, to, strict=True)))
        # A constant bias is left out. It has no gradient, and a transform that has ended since it
        # was saved may still wrap it, which vjp can't return.
        return (W,) if b is None or any(b is t for t in tensors) else (W, b)

    with without_saved_hooks():
        both: Any = torch.func.vjp(
            again, *(t for t, needed in zip(tensors, to, strict=True) if needed)
        )
    made, pull = both

    def gradients(dW: Tensor, G: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = pull((dW,) if len(made) == 1 else (dW, G.sum(0)))
        return found

    return made[0], gradients
