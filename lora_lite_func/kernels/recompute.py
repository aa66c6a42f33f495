"""x W'^T + b' of an adapted weight W', which is made again in the backward pass: nothing of its size is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["recomputed_linear"]

Make = Callable[..., tuple[Tensor, Tensor | None]]
"""Tensors to (W' (d_out, d_in), b' (d_out,) or None), without randomness."""


def recomputed_linear(make: Make, x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """x W'^T + b', (..., d_out), where W', b' = make(*tensors); gradients reach x and the tensors.

    Args:
        make: of the tensors alone: what else it knows is constant.
        x: (..., d_in).
        tensors: all that W' and b' depend on.
    """
    flat = x if x.ndim <= 2 else x.flatten(0, -2)  # (T, d_in)
    y: Tensor = _OneProduct.apply(make, flat, *tensors)
    return (
        y if flat is x else y.view(*x.shape[:-1], y.shape[-1])
    )  # not inside: autograd lets nobody write on a view that a function gives


class _OneProduct(torch.autograd.Function):
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

        def again(*learned: Tensor) -> tuple[Tensor, ...]:
            these = iter(learned)
            W, b = ctx.make(
                *(next(these) if needed else t for t, needed in zip(tensors, to, strict=True))
            )
            return (W,) if b is None else (W, b)

        if not learned:
            return None, g @ again()[0], *(None for _ in tensors)
        both: Any = torch.func.vjp(
            again, *learned
        )  # which composes, should this be differentiated again
        made, pull = both
        G = g.reshape(-1, g.shape[-1])  # (T, d_out)
        dW = G.mT @ x.reshape(-1, x.shape[-1])  # (d_out, d_in)
        back = iter(pull((dW, G.sum(0))[: len(made)]))
        return (
            None,
            g @ made[0] if to_x else None,
            *(next(back) if needed else None for needed in to),
        )
