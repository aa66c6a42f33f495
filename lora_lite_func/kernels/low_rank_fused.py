"""A low-rank update on a plain linear layer: y = x W^T + b + s (drop(x) A^T) B^T.

For methods with `Variant.low_rank_factors`. The branch is written in place onto the fresh product.
Where a gradient is wanted, the whole is one autograd function, and its backward pass writes the
branch's part onto the gradient of x in the same way. Neither dropout's mask nor the dropped input
is kept: the backward pass draws the mask again from its seed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.torch_internals import may_overwrite
from . import dropout as drop

__all__ = ["linear_with_low_rank", "low_rank", "one_row"]

_VECTORS = (torch.float32, torch.float64)
"""Dtypes in which a CPU's matrix-vector product is as fast as `linear` on one row and gives the
same bits.
"""


def low_rank(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    s: float,
    dropout: float = 0.0,
    transformed: bool = False,
) -> Tensor:
    """x W^T + b + s (drop(x) A^T) B^T, (..., d_out); gradients reach x, A and B.

    Args:
        x: (..., d_in), contiguous, of the dtype of all others.
        W: (d_out, d_in), a constant.
        b: (d_out,) or None, a constant.
        A: (r, d_in).
        B: (d_out, r).
        s: the scale.
        dropout: probability that an entry of the branch's input is dropped.
        transformed: whether a transform of torch.func has a part in the call.
    """
    seed = int(drop.draw_seed()) if dropout else 0
    call = _LowRank if transformed else _Eager
    y: Tensor = call.apply(_flat(x), W, b, A, B, s, dropout, seed)[0]
    # The view is made outside: autograd forbids writing on a view that a function returns.
    return y if x.ndim == 2 else y.view(*x.shape[:-1], W.shape[0])


def linear_with_low_rank(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float, X: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y, h) without a graph: y = x W^T + b + s h B^T (..., d_out) and h = X A^T (T, r).

    X (T, d_in) is the branch's input; x where it isn't given.
    """
    y = F.linear(x, W, b)
    h = F.linear(_flat(x) if X is None else X, A)  # (T, r)
    _flat(y).addmm_(h, B.mT, alpha=s)
    return y, h


def one_row(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    """The y of `linear_with_low_rank` for an x of one row, by matrix-vector products, which torch
    dispatches faster.
    """
    v = x.view(-1)
    if not x.is_cpu or x.dtype not in _VECTORS:
        y = F.linear(x, W, b).view(-1)
    elif b is None:
        y = W.mv(v)
    else:
        y = torch.addmv(b, W, v)
    y.addmv_(B, A.mv(v), alpha=s)
    return y.view(1, 1, -1) if x.ndim == 3 else y.view(*x.shape[:-1], -1)


class _LowRank(torch.autograd.Function):
    """(y, h = drop(x) A^T) of x (T, d_in). h is an output so that the saved h can be differentiated
    again.
    """

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        s: float,
        dropout: float,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        if not dropout:
            return linear_with_low_rank(x, W, b, A, B, s)
        kept = x * drop.mask(x, dropout, seed)  # (T, d_in)
        return linear_with_low_rank(x, W, b, A * drop.gain(dropout), B, s, kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, W, _, A, B, ctx.s, ctx.dropout, ctx.seed = inputs
        # x is kept for A's gradient alone (and its shape for dropout's mask)
        kept = x if ctx.needs_input_grad[3] or ctx.dropout else None
        ctx.save_for_backward(kept, W, A, B, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, gh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        to_x, _, _, to_A, to_B, *_ = ctx.needs_input_grad
        dx = dA = dB = mask = dh = None
        G = h.new_zeros(h.shape[0], W.shape[0]) if g is None else g  # (T, d_out)
        if to_x or to_A:
            dh = (B.mT @ G.mT) * ctx.s  # (r, T); several times as fast as G B
            if gh is not None:  # the gradient is differentiated again, and reads h
                dh = dh + gh.mT
            if ctx.dropout:
                dh = dh * drop.gain(ctx.dropout)  # (r, T)
                mask = drop.mask(x, ctx.dropout, ctx.seed)  # (T, d_in)
        if to_x:
            assert dh is not None
            if mask is None:
                dx = _plus_product(G @ W, dh.mT, A)
            else:
                dx = torch.addcmul(G @ W, dh.mT @ A, mask)
        if to_A:
            assert dh is not None
            dA = dh @ (x if mask is None else x * mask)  # (r, d_in)
        if to_B:
            dB = ((h.mT @ G) * ctx.s).mT.contiguous()  # (d_out, r): several times as fast as G^T h
        return dx, None, None, dA, dB, None, None, None


class _Eager(_LowRank):
    """The same for calls outside the transforms of torch.func. A call by a `forward` that takes ctx
    costs a third of one by the `forward` and `setup_context` that transforms need.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _LowRank.forward(*inputs)
        _LowRank.setup_context(ctx, inputs, output)
        return output

    setup_context = torch.autograd.Function.setup_context


def _plus_product(Y: Tensor, h: Tensor, A: Tensor) -> Tensor:
    """Y + h A, written onto Y where no graph and no transform needs it."""
    return Y.addmm_(h, A) if may_overwrite(h) else torch.addmm(Y, h, A)


def _flat(x: Tensor) -> Tensor:
    """(..., d) as (T, d): a view of what is contiguous."""
    if x.ndim == 3:  # the common case in the fewest calls
        return x.squeeze(0) if x.shape[0] == 1 else x.flatten(0, 1)
    return x.reshape(-1, x.shape[-1])
