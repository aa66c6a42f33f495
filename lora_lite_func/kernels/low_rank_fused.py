"""A low-rank update on a plain linear layer, y = x W^T + b + s (drop(x) A^T) B^T, for what `Variant.factors` says.

The branch is written onto the fresh product in place. Where it is to be differentiated it is one function: its gradient of x is too, and
nothing is kept of dropout's mask, which is drawn again from its seed, nor of the dropped input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..core.torch_internals import may_overwrite

__all__ = ["linear_with_low_rank", "low_rank", "one_row"]

_VECTORS = (torch.float32, torch.float64)
"""In which a CPU multiplies a matrix and a vector just as `linear` does with one row: as fast, and
bit by bit.
"""

_LEVELS = 1 << 16
"""A probability is rounded to so many levels: a draw of 64 bits then decides on four entries
(drawing dominates dropout on a CPU).
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
    seed = (
        int(torch.randint(1 << 62, (), device="cpu")) if dropout else 0
    )  # torch.manual_seed, checkpointing, forked generators rule it
    call = _LowRank if transformed else _Eager
    y: Tensor = call.apply(_flat(x), W, b, A, B, s, dropout, seed)[0]
    return (
        y if x.ndim == 2 else y.view(*x.shape[:-1], W.shape[0])
    )  # not inside: autograd lets nobody write on a view that a function gives


def linear_with_low_rank(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float, X: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y, h) without a graph: y = x W^T + b + s h B^T (..., d_out), h = X A^T (T, r), where X (T,
    d_in) is x if it isn't given.
    """
    y = F.linear(x, W, b)
    h = F.linear(_flat(x) if X is None else X, A)  # (T, r)
    _flat(y).addmm_(h, B.mT, alpha=s)
    return y, h


def one_row(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
    """`beside`'s y for an x of one row: products with vectors are dispatched faster, and give the
    same.
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
    """(y, h = drop(x) A^T) of x (T, d_in). h is an output so that what is kept of it can be
    differentiated again.
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
        return (
            linear_with_low_rank(x, W, b, A * _gain(dropout), B, s, x * _mask(x, dropout, seed))
            if dropout
            else linear_with_low_rank(x, W, b, A, B, s)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, W, _, A, B, ctx.s, ctx.dropout, ctx.seed = inputs
        ctx.save_for_backward(x, W, A, B, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, gh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        to_x, _, _, to_A, to_B, *_ = ctx.needs_input_grad
        dx = dA = dB = mask = dh = None
        G = x.new_zeros(x.shape[0], W.shape[0]) if g is None else g  # (T, d_out)
        if to_x or to_A:
            dh = (B.mT @ G.mT) * ctx.s  # (r, T): several times as fast as G B
            dh = (
                dh if gh is None else dh + gh.mT
            )  # where the gradient is differentiated again: it reads h
            if ctx.dropout:
                dh, mask = (
                    dh * _gain(ctx.dropout),
                    _mask(x, ctx.dropout, ctx.seed),
                )  # (r, T), (T, d_in)
        if to_x:
            assert dh is not None
            dx = (
                torch.addcmul(G @ W, dh.mT @ A, mask)
                if mask is not None
                else _plus_product(G @ W, dh.mT, A)
            )
        if to_A:
            assert dh is not None
            dA = dh @ (x if mask is None else x * mask)  # (r, d_in)
        if to_B:
            dB = ((h.mT @ G) * ctx.s).mT.contiguous()  # (d_out, r): several times as fast as G^T h
        return dx, None, None, dA, dB, None, None, None


class _Eager(_LowRank):
    """The same where no transform of torch.func has a part in it: without their form of `forward` a
    call costs a third.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _LowRank.forward(*inputs)
        _LowRank.setup_context(ctx, inputs, output)
        return output

    setup_context = torch.autograd.Function.setup_context


def _plus_product(Y: Tensor, h: Tensor, A: Tensor) -> Tensor:
    """Y + h A, onto Y where nothing else has a part in it."""
    return Y.addmm_(h, A) if may_overwrite(h) else torch.addmm(Y, h, A)


def _flat(x: Tensor) -> Tensor:
    """(..., d) as (T, d): a view of what is contiguous."""
    if x.ndim == 3:  # in the fewest calls
        return x.squeeze(0) if x.shape[0] == 1 else x.flatten(0, 1)
    return x.reshape(-1, x.shape[-1])


_BATCHES = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("VmapMode"))


def _level(p: float) -> int:
    return min(round(p * _LEVELS), _LEVELS - 1)


def _gain(p: float) -> float:
    """What inverted dropout multiplies what it keeps by, 1 / (1 - p)."""
    return _LEVELS / (_LEVELS - _level(p))


def _mask(X: Tensor, p: float, seed: int) -> Tensor:
    """What is kept (1) and dropped (0) of X, in its shape and dtype; the same for the same seed."""
    with (
        temporarily_clear_interpreter_stack(),
        torch._C._ExcludeDispatchKeyGuard(_BATCHES),
    ):  # vmap over gradients draws nothing
        draws = torch.empty((X.numel() + 3) // 4, dtype=torch.int64, device=X.device)
        draws.random_(-(1 << 63), None, generator=torch.Generator(X.device).manual_seed(seed))
        return (draws.view(torch.int16)[: X.numel()].view(X.shape) >= _level(p) - _LEVELS // 2).to(
            X.dtype
        )
