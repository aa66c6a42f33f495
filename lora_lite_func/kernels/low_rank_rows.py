"""A low-rank update on a plain linear layer where each row of the batch has its own member.

Each segment's branch is written onto its rows of the layer's output. Where the call is to be
differentiated it is one function, as in low_rank_fused.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.torch_internals import may_overwrite
from .segment_products import add_branch, add_product, leaves_of, members_of, product, rows_of
from .segments import Segment, SegmentLayout

__all__ = ["low_rank_by_rows"]


def low_rank_by_rows(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    s: float | Tensor,
    layout: SegmentLayout,
    segments: tuple[Segment, ...],
) -> Tensor:
    """y (N, ..., d_out) with each row's own low-rank update added.

    Args:
        x: (N, ..., d_in), contiguous.
        W: (d_out, d_in).
        b: (d_out,) or None.
        A: (K, r, d_in), one pair of factors for each member.
        B: (K, d_out, r).
        s: the scale, a float or (K, 1, 1); a tensor gets no gradient here.
        layout: which rows belong to which members.
        segments: the segments of the layout whose updates are to be added.
    """
    if torch.is_grad_enabled():
        return _with_graph(layout, segments, x, W, b, A, B, s)
    X = x if layout.take is None else x.index_select(0, layout.take)
    return _without_graph(layout, segments, x, X, W, b, A, B, s)


def _with_graph(
    layout: SegmentLayout,
    segments: tuple[Segment, ...],
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    s: float | Tensor,
) -> Tensor:
    """y where a graph is recorded. No row of the sorted batch is repeated there."""
    take, back = layout.take, layout.back
    X: Tensor = x if take is None else _Reordered.apply(x, take, back)
    flat, tokens = X.view(-1, X.shape[-1]), X[0].numel() // X.shape[-1]
    y: Tensor = _LowRankByRows.apply(flat, W, b, A, B, s, segments, tokens)
    # The view is made outside: autograd forbids writing on a view that a function returns.
    y = y.view(*x.shape[:-1], W.shape[0])
    return y if take is None else _Reordered.apply(y, back, take)


def _without_graph(
    layout: SegmentLayout,
    segments: tuple[Segment, ...],
    x: Tensor,
    X: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    s: float | Tensor,
) -> Tensor:
    """y where no graph is recorded. Where the sorted batch X repeats rows, the layer runs on x, and
    the update alone on X.
    """
    rows, tokens = X.shape[0], 1
    if X.ndim > 2 and len(segments) > 1:  # flattened once, rather than for each segment
        X, tokens = X.view(-1, X.shape[-1]), X[0].numel() // X.shape[-1]
    repeats = rows != x.shape[0]
    if repeats:
        y = _update(layout, segments, tokens, X, A, B, s)
    else:
        y = F.linear(X, W, b)
        for segment in segments:
            add_branch(segment, tokens, y, X, A, B, s)
    if y.ndim != x.ndim:
        y = y.view(rows, *x.shape[1:-1], W.shape[0])
    if layout.back is not None:
        y = y.index_select(0, layout.back)
    return F.linear(x, W, b).add_(y) if repeats else y


def _update(
    layout: SegmentLayout,
    segments: tuple[Segment, ...],
    tokens: int,
    X: Tensor,
    A: Tensor,
    B: Tensor,
    s: float | Tensor,
) -> Tensor:
    """The update alone, (N tokens, ..., d_out), of a batch that repeats rows; zero where a row has
    no adapter.
    """
    start, stop = layout.bare
    banded = any(segment.ranks is not None for segment in segments)
    y = X.new_zeros(*X.shape[:-1], B.shape[1]) if banded else X.new_empty(*X.shape[:-1], B.shape[1])
    if stop > start:
        y[start * tokens : stop * tokens] = 0.0
    for segment in segments:
        add_branch(segment, tokens, y, X, A, B, s, 1.0 if banded else 0.0)
    return y


class _Reordered(torch.autograd.Function):
    """Rows in another order. The gradient is taken by index_select too; the gradient of torch's own
    index_select would add entry by entry onto zeros.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return t.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None]:
        return G.index_select(0, ctx.back), None, None


class _LowRankByRows(torch.autograd.Function):
    """y (N tokens, d_out) of the sorted batch X (N tokens, d_in); gradients reach X, A and B,
    exactly zero where a member has no row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        s: float | Tensor,
        segments: tuple[Segment, ...],
        tokens: int,
    ) -> Tensor:
        y = F.linear(X, W, b)
        hs = [add_branch(segment, tokens, y, X, A, B, s) for segment in segments]
        ctx.s, ctx.segments, ctx.tokens = s, segments, tokens
        ctx.save_for_backward(X, W, b, A, B, *hs)
        return y

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        X, W, b, A, B, *hs = ctx.saved_tensors
        to_X, _, _, to_A, to_B, *_ = ctx.needs_input_grad
        if not may_overwrite(G):
            return _gradients_out_of_place(ctx, X, W, b, A, B, G)
        G, s, tokens = G.contiguous(), ctx.s, ctx.tokens
        dX = G @ W if to_X else None
        dA, dBt = _SegmentGradients(A, ctx.segments), _SegmentGradients(B.mT, ctx.segments)
        for segment, h in zip(ctx.segments, hs, strict=True):
            g = rows_of(segment, tokens, G)  # (m, n, d_out)
            if to_X or to_A:
                dh = product(leaves_of(segment, B.mT), g.mT)  # (m, r, n)
                dh.mul_(s if isinstance(s, float) else members_of(segment, s))
                if dX is not None:
                    add_product(rows_of(segment, tokens, dX), dh.mT, leaves_of(segment, A))
                if to_A:
                    dA.put(segment, dh, rows_of(segment, tokens, X))  # (m, r, d_in)
            if to_B:
                dBt.put(segment, h * s if isinstance(s, float) else h, g)  # (m, r, d_out)
        return (
            dX,
            None,
            None,
            dA.made if to_A else None,
            dBt.made.mT.contiguous() if to_B else None,
            None,
            None,
            None,
        )


class _SegmentGradients:
    """Gradients of leaves (K, r, d), segment by segment; zero where there is none."""

    def __init__(self, like: Tensor, segments: tuple[Segment, ...]) -> None:
        self.alone = (
            len(segments) == 1
            and segments[0].whole
            and segments[0].ranks is None
            and like.shape[0] > 1
        )
        self.made = like if self.alone else like.new_zeros(like.shape)

    def put(self, segment: Segment, a: Tensor, b: Tensor) -> None:
        """Put in the gradient of a segment, the product a b."""
        if self.alone:
            self.made = torch.bmm(a, b)
        else:
            product(a, b, out=leaves_of(segment, self.made))


def _gradients_out_of_place(
    ctx: Any, X: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, G: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients by autograd, over operations that write on nothing.

    X, A and B are viewed first: X depends on A and B where the layer was called before, and
    gradients along those paths must not be counted here.
    """
    to_X, _, _, to_A, to_B, *_ = ctx.needs_input_grad
    with torch.enable_grad():
        X, A, B = (t.view_as(t) for t in (X, A, B))
        y = F.linear(X, W, b)
        for segment in ctx.segments:
            s = ctx.s if isinstance(ctx.s, float) else members_of(segment, ctx.s)
            h = product(leaves_of(segment, A), rows_of(segment, ctx.tokens, X).mT)  # (m, r, n)
            branch = product((h * s).to(X.dtype).mT, leaves_of(segment, B.mT))
            added = (rows_of(segment, ctx.tokens, y) + branch).view(-1, y.shape[-1])
            start = segment.start * ctx.tokens
            y = torch.slice_scatter(y, added, 0, start, start + added.shape[0])
        given = [t for t, to in zip((X, A, B), (to_X, to_A, to_B), strict=True) if to]
        found = iter(torch.autograd.grad(y, given, G, create_graph=True, materialize_grads=True))
    dX, dA, dB = (next(found) if to else None for to in (to_X, to_A, to_B))
    return dX, None, None, dA, dB, None, None, None
