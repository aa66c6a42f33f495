"""A plain linear layer with one adapter in: the cheapest of equal forms, where nothing but W, its bias and the adapter has a part in it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.layout import SCALING, unfolded
from ..core.site import Params
from ..core.torch_internals import is_ordinary, is_transformed, is_watched
from ..kernels.low_rank_fused import linear_with_low_rank, low_rank, one_row
from ..kernels.low_rank_rows import low_rank_by_rows
from ..kernels.recompute import recomputed_linear
from .attachment import Attachment
from .prepared import ready_at
from .rows_activation import shared
from .state import tensors_at

__all__ = ["linear", "only"]

_DENSE = (nn.Parameter, Tensor)
_WIDE = (torch.float32, torch.float64)
_COPY = 16
"""Writing W' costs what this much more of the rank would (measured on a CPU at 512 to 2,048 tokens,
ranks 8 and 64).
"""


def only(attachments: tuple[Attachment, ...]) -> Attachment | None:
    """The one adapter of a site that `linear` may serve; None if phases have to."""
    if len(attachments) != 1 or attachments[0].site.kind != "linear":
        return None
    attachment, variant = attachments[0], attachments[0].variant
    if attachment.row_plan is not None:
        return attachment if variant.low_rank_factors is not None and variant.batched else None
    return attachment if variant.low_rank_factors is not None or variant.dense is not None else None


def linear(module: Any, attachment: Attachment, x: Any) -> Tensor | None:
    """The layer's output with the adapter in, (..., d_out); None where the phases have to make it.

    One product with W' where that costs less, by sizes alone: where the method says so
    (`Variant.dense`), or for a low-rank update that isn't to be differentiated. Else a low-rank
    update in place, as one function where it is to be; within torch.func.grad, where a function
    costs more than it saves, the phases do without dropout.
    """
    own = module._parameters
    W, b = own.get("weight"), own.get("bias")
    if (
        type(x) is not Tensor
        or type(W) not in _DENSE
        or x.dtype is not W.dtype
        or not is_ordinary()
        or not x.numel()
    ):
        return None
    if (
        (b is None and "bias" not in own)
        or x.layout is not torch.strided
        or W.layout is not torch.strided
    ):
        return None  # a bias from elsewhere (computed, pruned, a buffer), or something sparse
    variant, site, graph = attachment.variant, attachment.site, torch.is_grad_enabled()
    dropout = attachment.dropout and module.training
    if graph and (
        W.requires_grad
        or (b is not None and b.requires_grad)
        or (is_transformed() and not dropout and variant.low_rank_factors)
    ):
        return None
    if graph and torch.is_inference_mode_enabled():
        return None  # a function would keep what can't be kept; plain calls make no graph there
    p = tensors_at(attachment, module)
    if attachment.row_plan is not None:
        agree = (
            x.is_contiguous()
            and attachment.row_plan.known
            and all(t.dtype is x.dtype for name, t in p.items() if name != SCALING)
        )
        return (
            _by_rows(attachment, p, W, b, x)
            if agree and not dropout and not (graph and (x.is_meta or is_watched()))
            else None
        )
    if variant.low_rank_factors is None:
        return None if dropout else _whole(attachment, p, x, W, b)
    if SCALING in p:
        p, site = unfolded(p, site)
    ready = ready_at(attachment, module)
    A, B, s = variant.low_rank_factors(attachment.cfg, p, site) if ready is None else ready[1]
    if (
        type(s) is not float
        or A.dtype is not x.dtype
        or B.dtype is not x.dtype
        or not x.is_contiguous()
    ):
        return None
    if dropout or graph:
        return (
            None
            if x.is_meta or is_watched()
            else low_rank(x, W, b, A, B, s, attachment.dropout if dropout else 0.0)
        )
    if x.numel() == site.d_in:
        return one_row(x, W, b, A, B, s)
    r = A.shape[0]
    if (
        x.numel() * (site.d_in + site.d_out) * r > site.d_in**2 * site.d_out * (r + _COPY)
        and x.dtype in _WIDE
    ):
        return F.linear(
            x, torch.addmm(W, B, A, alpha=s), b
        )  # cheaper than both products beside x W^T
    return linear_with_low_rank(x, W, b, A, B, s)[0]


def _by_rows(
    attachment: Attachment, p: Params, W: Tensor, b: Tensor | None, x: Tensor
) -> Tensor | None:
    """The output where each row has a member of its own; None where the scale is differentiated.

    Raises:
        StructureError: the leading dimension isn't the rows.
    """
    assert attachment.row_plan is not None
    assert attachment.variant.low_rank_factors is not None
    graph = torch.is_grad_enabled()
    q, site = unfolded(p, attachment.site)
    A, B, s = attachment.variant.low_rank_factors(attachment.cfg, q, site)
    # only a factor pair as it is stored has zeros behind a shorter member's ranks
    banded = attachment.row_plan.ranks is not None and A.shape[1] == site.r
    layout = attachment.row_plan.layout(x, site.path, in_place=True, banded=banded)
    segments = layout.segments
    if banded:
        segments = tuple(
            segment for segment in segments if segment.ranks is None or segment.ranks[0] < site.r
        )
    if isinstance(s, Tensor):
        if graph and s.requires_grad:
            return None
        s = s.expand(A.shape[0]).view(-1, 1, 1)
    X = None if graph else shared(x, layout, site.path)
    return low_rank_by_rows(x, W, b, A, B, s, layout, segments, X)


def _whole(
    attachment: Attachment, p: Params, x: Tensor, W: Tensor, b: Tensor | None
) -> Tensor | None:
    """x W'^T + b', where the method says so and W' wouldn't round what the phases keep."""
    variant, cfg, names = attachment.variant, attachment.cfg, tuple(p)
    assert variant.dense is not None
    if (
        x.dtype not in _WIDE
        or any(t.dtype != x.dtype for t in p.values())
        or not variant.dense(cfg, attachment.site, x.numel() // attachment.site.d_in)
    ):
        return None

    def make(W: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor | None]:
        own, site = unfolded(dict(zip(names, rest, strict=False)), attachment.site)
        assert variant.weight is not None
        return variant.weight(cfg, own, site, W, None if b is None else rest[-1])

    tensors = (W, *p.values()) if b is None else (W, *p.values(), b)
    return (
        recomputed_linear(make, x, tensors)
        if torch.is_grad_enabled()
        else F.linear(x, *make(*tensors))
    )
