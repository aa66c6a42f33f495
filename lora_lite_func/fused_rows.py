"""A low-rank update on a plain linear layer where rows of the batch have members of their own: each run's branch written onto its rows.

Where it is to be differentiated it is one function, as in fused.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .batching import shared
from .modes import may_overwrite
from .ops import Op, unfolded
from .spec import Params

__all__ = ["low_rank_by_rows"]


class _Piece(NamedTuple):
    """Members `low` to `high`, each with as many rows of the sorted batch, from `start` to `stop`; none of a rank above r."""

    low: int
    high: int
    start: int
    stop: int
    r: int

    def rows(self, t: Tensor) -> Tensor:
        """Its rows of a tensor (N, ..., d), as (m, n, d): a view."""
        return t[self.start : self.stop].view(self.high - self.low, -1, t.shape[-1])

    def factors(self, A: Tensor, B: Tensor, s: float | Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        """Its members' A (m, r, d_in), B (m, d_out, r), and s, a float or (m, 1, 1)."""
        here = slice(self.low, self.high)
        return A[here, : self.r], B[here, :, : self.r], s.expand(A.shape[0])[here, None, None] if isinstance(s, Tensor) else s


def low_rank_by_rows(op: Op, p: Params, W: Tensor, b: Tensor | None, x: Tensor) -> Tensor | None:
    """y (N, ..., d_out) with each row's own adapter in; None where it is to be differentiated and phases have to make it.

    Args:
        op: the method at the site, with `factors` that take several members at once, and the plan of the rows.
        p: its tensors, each with a leading axis of members.
        W: (d_out, d_in).
        b: (d_out,) or None.
        x: (N, ..., d_in), contiguous.

    Raises:
        StructureError: the leading dimension isn't the rows.
    """
    assert op.plan is not None
    assert op.variant.factors is not None
    graph, table = torch.is_grad_enabled(), op.plan.table(x, op.site.path, ranked=True)
    take = table.take
    each = take is None or take.shape[0] == x.shape[0]  # no row stands in several places
    if graph and not each:
        return None
    q, site = unfolded(p, op.site)
    A, B, s = op.variant.factors(op.cfg, q, site)
    if graph and isinstance(s, Tensor) and s.requires_grad:
        return None
    X = shared(x, table)
    ranks = op.plan.ranks if A.shape[1] == site.r else None  # a factor pair as it is: of a shorter member the rest is zeros
    pieces = tuple(
        _Piece(low, high, start, start + (high - low) * width, A.shape[1] if ranks is None else max(ranks[low:high]))
        for low, high, width, start in table.runs
    )
    y: Tensor
    if graph:
        y = _ByRows.apply(X, W, b, A, B, s, pieces)
    else:
        y = F.linear(X, W, b) if each else F.linear(x, W, b).index_select(0, take)  # type: ignore[arg-type]
        for piece in pieces:
            _onto(piece, y, X, A, B, s)
    return y if table.back is None else y.index_select(0, table.back)


def _onto(piece: _Piece, y: Tensor, X: Tensor, A: Tensor, B: Tensor, s: float | Tensor) -> Tensor:
    """Add s h B^T onto the piece's rows of y (N, ..., d_out), in place; h^T = A X^T (m, r, n)."""
    A, B, s = piece.factors(A, B, s)
    h = A @ piece.rows(X).mT  # the long side inside, up to twice as fast
    scaled, alpha = (h, s) if isinstance(s, float) else ((h * s).to(h.dtype), 1.0)
    piece.rows(y).baddbmm_(scaled.mT, B.mT, alpha=alpha)
    return h


class _ByRows(torch.autograd.Function):
    """y of the sorted batch X (N, ..., d_in); gradients reach X, A and B, exactly zero where a member has no row."""

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float | Tensor, pieces: tuple[_Piece, ...]
    ) -> Tensor:
        y = F.linear(X, W, b)
        hs = [_onto(piece, y, X, A, B, s) for piece in pieces]
        ctx.s, ctx.pieces = s, pieces
        ctx.save_for_backward(X, W, b, A, B, *hs)
        return y

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        X, W, b, A, B, *hs = ctx.saved_tensors
        to_X, _, _, to_A, to_B, *_ = ctx.needs_input_grad
        if not may_overwrite(G):
            return _plainly(ctx, X, W, b, A, B, G)
        G = G.contiguous()
        dX = G @ W if to_X else None
        dA, dB = _Gathered(A, ctx.pieces), _Gathered(B.mT, ctx.pieces)
        for piece, h in zip(ctx.pieces, hs, strict=True):
            own, out, s = piece.factors(A, B, ctx.s)
            g, there = piece.rows(G), piece.rows(X)  # (m, n, d_out), (m, n, d_in)
            if to_X or to_A:
                dh = (out.mT @ g.mT * s).to(g.dtype)  # (m, r, n)
                if dX is not None:
                    piece.rows(dX).baddbmm_(dh.mT, own)
                if to_A:
                    dA.put(piece, dh @ there)  # (m, r, d_in)
            if to_B:
                dB.put(piece, (h * s).to(h.dtype) @ g)  # (m, r, d_out)
        return dX, None, None, dA.all() if to_A else None, dB.all().mT.contiguous() if to_B else None, None, None


class _Gathered:
    """Gradients of leaves (K, r, d), piece by piece; zero where no piece is."""

    def __init__(self, like: Tensor, pieces: tuple[_Piece, ...]) -> None:
        self.like, self.whole = like, len(pieces) == 1 and pieces[0].low == 0 and (pieces[0].high, pieces[0].r) == like.shape[:2]
        self.made: Tensor | None = None

    def put(self, piece: _Piece, g: Tensor) -> None:
        """A piece's (m, r, d)."""
        if self.whole:
            self.made = g
        else:
            self.all()[piece.low : piece.high, : piece.r] = g

    def all(self) -> Tensor:
        """(K, r, d)."""
        if self.made is None:
            self.made = self.like.new_zeros(self.like.shape)
        return self.made


def _plainly(ctx: Any, X: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, G: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by autograd over operations that make new tensors."""
    to_X, _, _, to_A, to_B, *_ = ctx.needs_input_grad
    with torch.enable_grad():
        y, parts, at = F.linear(X, W, b), [], 0
        for piece in sorted(ctx.pieces, key=lambda piece: piece.start):
            own, out, s = piece.factors(A, B, ctx.s)
            h = (own @ piece.rows(X).mT * s).to(X.dtype)  # (m, r, n)
            added = torch.baddbmm(piece.rows(y), h.mT, out.mT)
            parts += [y[at : piece.start], added.view_as(y[piece.start : piece.stop])]
            at = piece.stop
        y = torch.cat([*parts, y[at:]])
        given = [t for t, to in zip((X, A, B), (to_X, to_A, to_B), strict=True) if to]
        found = iter(torch.autograd.grad(y, given, G, create_graph=True, materialize_grads=True))
    dX, dA, dB = (next(found) if to else None for to in (to_X, to_A, to_B))
    return dX, None, None, dA, dB, None, None
