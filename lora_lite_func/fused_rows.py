"""A low-rank update on a plain linear layer where rows of the batch have members of their own: each run's branch written onto its rows.

Where it is to be differentiated it is one function, as in fused.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .batching import shared
from .modes import may_overwrite
from .ops import Op, unfolded
from .plan import Run
from .spec import Params

__all__ = ["low_rank_by_rows"]


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
    graph, table = torch.is_grad_enabled(), op.plan.ranked(x, op.site.path)
    take = table.take
    each = take is None or take.shape[0] == x.shape[0]  # no row stands in several places
    if graph and not each:
        return None
    q, site = unfolded(p, op.site)
    A, B, s = op.variant.factors(op.cfg, q, site)
    if graph and isinstance(s, Tensor) and s.requires_grad:
        return None
    if isinstance(s, Tensor):
        s = s.expand(A.shape[0]).view(-1, 1, 1)
    X = shared(x, table, op.site.path)
    cut = A.shape[1] == site.r  # a factor pair as it is: of a shorter member the rest is zeros
    y: Tensor
    if graph:
        y = _ByRows.apply(X, W, b, A, B, s, table.runs, cut)
        if X.ndim != 2:  # not inside: autograd lets nobody write on a view that a function gives
            y = y.view(*X.shape[:-1], W.shape[0])
    else:
        y = F.linear(X, W, b) if each else F.linear(x, W, b).index_select(0, take)  # type: ignore[arg-type]
        for run in table.runs:
            _onto(run, cut, y, X, A, B, s)
    return y if table.back is None else y.index_select(0, table.back)


def _rows(run: Run, t: Tensor) -> Tensor:
    """The run's rows of a tensor (N, ..., d), as (m, n, d): a view."""
    members = run.high - run.low
    if not run.whole:
        t = t[run.start : run.start + members * run.width]
    return t if run.width == 1 and t.ndim == 3 else t.view(members, -1, t.shape[-1])


def _factors(run: Run, cut: bool, A: Tensor, B: Tensor, s: float | Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
    """The run's members' A (m, r, d_in), B (m, d_out, r), and s, a float or (m, 1, 1); with `cut` none of a rank above their largest."""
    if not run.whole:
        A, B = A[run.low : run.high], B[run.low : run.high]
        s = s if isinstance(s, float) else s[run.low : run.high]
    if cut and run.rank is not None:
        A, B = A[:, : run.rank], B[:, :, : run.rank]
    return A, B, s


def _onto(run: Run, cut: bool, y: Tensor, X: Tensor, A: Tensor, B: Tensor, s: float | Tensor) -> Tensor:
    """Add s (X A^T) B^T onto the run's rows of y (N, ..., d_out), in place. A X^T (m, r, n), with s in where that isn't a float."""
    A, B, s = _factors(run, cut, A, B, s)
    h = torch.bmm(A, _rows(run, X).mT)  # the long side inside, up to twice as fast
    if not isinstance(s, float):
        h.mul_(s)
    _rows(run, y).baddbmm_(h.mT, B.mT, alpha=s if isinstance(s, float) else 1.0)
    return h


class _ByRows(torch.autograd.Function):
    """y (T, d_out) of the sorted batch X (N, ..., d_in); gradients reach X, A and B, exactly zero where a member has no row."""

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float | Tensor, runs: tuple[Run, ...], cut: bool
    ) -> Tensor:
        y = F.linear(X.flatten(0, -2), W, b)  # (T, d_out)
        Y = y.view(*X.shape[:-1], W.shape[0])
        hs = [_onto(run, cut, Y, X, A, B, s) for run in runs]
        ctx.s, ctx.runs, ctx.cut = s, runs, cut
        ctx.save_for_backward(X, W, b, A, B, *hs)
        return y

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        X, W, b, A, B, *hs = ctx.saved_tensors
        to_X, _, _, to_A, to_B, *_ = ctx.needs_input_grad
        overwrites, G = may_overwrite(G), G.reshape(*X.shape[:-1], W.shape[0])
        if not overwrites:
            return _plainly(ctx, X, W, b, A, B, G)
        G = G.contiguous()
        dX = G @ W if to_X else None
        dA, dB = _Gathered(A), _Gathered(B.mT)
        for run, h in zip(ctx.runs, hs, strict=True):
            own, out, s = _factors(run, ctx.cut, A, B, ctx.s)
            g = _rows(run, G)  # (m, n, d_out)
            if to_X or to_A:
                dh = (torch.bmm(out.mT, g.mT) * s).to(g.dtype)  # (m, r, n)
                if dX is not None:
                    _rows(run, dX).baddbmm_(dh.mT, own)
                if to_A:
                    dA.put(run, torch.bmm(dh, _rows(run, X)))  # (m, r, d_in)
            if to_B:
                dB.put(run, torch.bmm(h * s if isinstance(s, float) else h, g))  # (m, r, d_out)
        return dX, None, None, dA.all() if to_A else None, dB.all().mT.contiguous() if to_B else None, None, None, None


class _Gathered:
    """Gradients of leaves (K, r, d), run by run; zero where no run is."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.made: Tensor | None = None

    def put(self, run: Run, g: Tensor) -> None:
        """A run's (m, r, d)."""
        if run.whole and g.shape[1] == self.like.shape[1]:
            self.made = g
        else:
            self.all()[run.low : run.high, : g.shape[1]] = g

    def all(self) -> Tensor:
        """(K, r, d)."""
        if self.made is None:
            self.made = self.like.new_zeros(self.like.shape)
        return self.made


def _plainly(ctx: Any, X: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, G: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by autograd over operations that make new tensors.

    Of tensors of their own: X may depend on A and B, where the layer was called before.
    """
    to_X, _, _, to_A, to_B, *_ = ctx.needs_input_grad
    with torch.enable_grad():
        X, A, B = (t.view_as(t) for t in (X, A, B))
        y, parts, at = F.linear(X, W, b), [], 0
        for run in sorted(ctx.runs, key=lambda run: run.start):
            own, out, s = _factors(run, ctx.cut, A, B, ctx.s)
            rows = _rows(run, y)  # (m, n, d_out)
            h = (torch.bmm(own, _rows(run, X).mT) * s).to(X.dtype)  # (m, r, n)
            added, stop = torch.baddbmm(rows, h.mT, out.mT), run.start + (run.high - run.low) * run.width
            parts += [y[at : run.start], added.view(-1, *y.shape[1:])]
            at = stop
        y = torch.cat([*parts, y[at:]])
        given = [t for t, to in zip((X, A, B), (to_X, to_A, to_B), strict=True) if to]
        found = iter(torch.autograd.grad(y, given, G, create_graph=True, materialize_grads=True))
    dX, dA, dB = (next(found) if to else None for to in (to_X, to_A, to_B))
    return dX, None, None, dA, dB, None, None, None
