"""Low-rank algebra of several methods: fused products, dense equivalents, decompositions."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.phase_functions import Map
from ..core.random import normal
from ..core.site import Site
from ..core.torch_internals import is_traced, makes_graph, may_overwrite

__all__ = [
    "add",
    "add_called",
    "add_dense",
    "alike",
    "around_core",
    "bottom_svd",
    "cast",
    "check_rank",
    "core_dtype",
    "difference",
    "expand",
    "plus_times",
    "project",
    "top_svd",
]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the adapter's dtype; under autocast as it is, since autocast casts by its own rules."""
    if x.dtype == dtype or (not x.is_meta and torch.is_autocast_enabled(x.device.type)):
        return x
    return x.to(dtype)


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dtype, the widest of theirs; as they are where theirs agree."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) == 1:
        return tensors
    wide = functools.reduce(torch.promote_types, dtypes)
    return tuple(t.to(wide) for t in tensors)


def core_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for small systems and norms: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float | Tensor = 1.0) -> Tensor:
    """y + s (x A^T) B^T, the low-rank branch fused onto y: one pass over y where the dtypes agree.

    It also takes several members at once: A (m, r, d_in), B (m, d_out, r), x (m, ..., d_in), y (m,
    ..., d_out), s a float or (m,).

    Args:
        y: (..., d_out), what the branch is added to; the result has its dtype.
        x: (..., d_in), or ids (...) of an embedding.
        A: (r, d_in).
        B: (d_out, r).
        s: a float, or a 0-dim tensor.
    """
    return expand(y, project(x, A), B, s)


def add_called(
    y: Tensor, x: Tensor, A: Map, B: Map, s: float | Tensor = 1.0, E: Tensor | None = None
) -> Tensor:
    """`add` by calls of the factors: y + s B(A(x)), or y + s B(E * A(x)), in y's dtype.

    Args:
        y: (..., d_out).
        x: (..., d_in), in the factors' dtype.
        A: takes (..., d_in) to (..., r).
        B: takes (..., r) to (..., d_out).
        s: a float, or a tensor () or (d_out,).
        E: (r,).
    """
    h = A(x)  # (..., r)
    return (y + B(h if E is None else h * E) * s).to(y.dtype)


def project(x: Tensor, A: Tensor) -> Tensor:
    """x A^T, (..., r). For ids, whose one-hot vectors A multiplies, rows of A^T are looked up."""
    if not x.is_floating_point():
        return F.embedding(x, A.mT)
    if A.ndim == 3:
        columns = _flat(cast(x, A.dtype)).mT  # (m, d_in, n)
        # A x^T rather than x A^T, because it is up to twice as fast with the long side inside.
        return torch.bmm(A, columns).mT.unflatten(1, x.shape[1:-1])
    return F.linear(cast(x, A.dtype), A)


def _flat(x: Tensor) -> Tensor:
    """(m, ..., d) as (m, n, d)."""
    return x if x.ndim == 3 else x.reshape(x.shape[0], -1, x.shape[-1])


def expand(y: Tensor, h: Tensor, B: Tensor, s: float | Tensor = 1.0) -> Tensor:
    """y + s h B^T in y's dtype: the second half of `add`, for any h (..., r)."""
    if h.dtype != B.dtype:
        h = cast(h, B.dtype)
    if not isinstance(s, float):
        by_member = s.view(-1, *[1] * (h.ndim - 1)) if s.ndim else s
        h, s = (h * by_member).to(h.dtype), 1.0
    if h.dtype == y.dtype:
        if B.dtype != h.dtype:
            B = B.to(h.dtype)  # under autocast
        Bt = _transposed(B)  # (r, d_out)
        if B.ndim == 3:
            if makes_graph():
                # Scaling h is cheaper: the backward pass of alpha would scale all of B's gradient.
                h, s = h * s, 1.0
            return torch.baddbmm(_flat(y), _flat(h), Bt, alpha=s).view_as(y)
        if y.ndim == 3 and not is_traced() and y.shape[0] == 1:
            # The same product, in fewer calls than flattening takes.
            return torch.baddbmm(y, h, Bt.unsqueeze(0), alpha=s)
        made = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), Bt, alpha=s)
        return made if y.ndim == 2 else made.view_as(y)
    h = h if s == 1.0 else h * s
    branch = torch.bmm(_flat(h), B.mT).view_as(y) if B.ndim == 3 else F.linear(h, B)
    return (y + branch).to(y.dtype)  # summed in the wider dtype


def _transposed(B: Tensor) -> Tensor:
    """B^T (..., r, d_out).

    Where a graph is recorded it is a copy, with which the products of both gradients are half as
    fast again. It is copied by way of a flat view, so that B's gradient has B's memory layout.
    """
    if makes_graph():
        return B.reshape(-1).view(B.shape).mT.contiguous()
    return B.mT


def add_dense(W: Tensor, A: Tensor, B: Tensor, s: float | Tensor = 1.0) -> Tensor:
    """W + s B A, (d_out, d_in), in W's dtype."""
    A, B = A.to(W.dtype), B.to(W.dtype)
    if not isinstance(s, float):
        A, s = A * s, 1.0
    return torch.addmm(W, B, A, alpha=s)


def plus_times(W: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    """W + P Q, entry by entry. P has the result's shape and dtype, and may be written over."""
    return torch.addcmul(W, P, Q, out=P) if may_overwrite() else torch.addcmul(W, P, Q)


def difference(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """B A - B0 A0 as one factor pair [A; A - A0] (2r, d_in), [B - B0, B0] (d_out, 2r).

    B A - B0 A0 = (B - B0) A + B0 (A - A0), which is exactly zero in every dtype while A is A0 and B
    is B0.
    """
    return torch.cat([A, A - A0], dim=-2), torch.cat([B - B0, B0], dim=-1)


def around_core(A: Tensor, R: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """B R A as one factor pair (r, d_in), (d_out, r): R (r, r) goes into the narrower factor."""
    return (R @ A, B) if A.shape[-1] <= B.shape[-2] else (A, B @ R)


def check_rank(site: Site, method: str) -> None:
    """Refuse a rank beyond min(d_in, d_out), which no d_out x d_in matrix has.

    Raises:
        UnsupportedError: the rank is larger than min(d_in, d_out).
    """
    limit = min(site.d_in, site.d_out)
    if site.r > limit:
        raise UnsupportedError(
            f"{method} splits a {site.d_out} x {site.d_in} weight, expected a rank of at most "
            f"{limit}, found r={site.r}; lower r, or set it there with rank_pattern"
        )


def top_svd(
    W: Tensor, r: int, niter: int | None, gen: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triplets: U (d_out, r), S (r,), Vh (r, d_in).

    Args:
        W: (d_out, d_in), float32 or float64.
        r: how many triplets.
        niter: None for the exact decomposition; else that many power iterations of the randomised
            one (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4 with an
            oversampling of 8).
        gen: CPU generator of the random start; torch's global one is left alone.
    """
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :r], S[:r], Vh[:r]
    k = min(r + 8, *W.shape)
    Q = torch.linalg.qr(W @ normal(1.0)((W.shape[1], k), gen).to(W))[0]  # (d_out, k)
    for _ in range(niter):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q)[0])[0]
    U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)  # (k, k), (k,), (k, d_in)
    return (Q @ U)[:, :r], S[:r], Vh[:r]


def bottom_svd(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r smallest singular triplets: U (d_out, r), S (r,), Vh (r, d_in).

    Args:
        W: (d_out, d_in), float32 or float64.
        r: how many triplets, at most min(d_out, d_in).
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, -r:], S[-r:], Vh[-r:]
