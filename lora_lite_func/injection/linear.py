"""The shortest way through a plain linear layer with one adapter in it.

`choose` picks a step when the site is made. A step serves the calls in which only W, the bias and
the adapter take part. It returns None for other calls, which are left to the phases. The forms of a
low-rank update give equal results; each exists for what it saves (see kernels/low_rank_fused.py).

What each buys over the phases, as time by it over time without it, in float32 on two cores of an
AMD EPYC (four layers of 512 x 512, rank 8; without and with a backward pass):

    LowRankStep  1 token 0.72, 0.91; 512 tokens 0.98, 0.96
                 one_row over the general form, 1 token: 0.83
                 W + s B A over two thin products in place, rank 64: 512 tokens 0.97, 2,048 0.81
    RowsStep     8 rows, 4 adapters: 1 token 0.72, 0.84; 512 tokens 0.91, 0.87
    DenseStep    512 tokens: HiRA 0.49, 0.74; LoHa 0.82, 1.02
                 2,048 tokens: HiRA 0.44, 0.63; OFT 0.89, 1.00
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.site import Params
from ..core.stacked import OF_MEMBERS, SCALING, unfolded
from ..core.torch_internals import is_watched, surroundings
from ..kernels import cost
from ..kernels.low_rank_fused import linear_with_low_rank, low_rank, one_row
from ..kernels.low_rank_rows import low_rank_by_rows
from ..kernels.mixture import Mixture, add_mixture
from ..kernels.recompute import recomputed_linear
from ..kernels.row_plan import RowPlan
from . import activation_route
from .attachment import Attachment
from .mixed_activation import stacked_factors
from .prepared import ready_of
from .state import Step, leaves_at, tensors_at, tensors_of

__all__ = ["choose", "forward"]

_DENSE = (nn.Parameter, Tensor)
_WIDE = (torch.float32, torch.float64)


def choose(attachments: tuple[Attachment, ...]) -> Step | None:
    """The step of a linear layer with these adapters; None if phases have to make its output."""
    if len(attachments) != 1 or attachments[0].site.kind != "linear":
        return None
    attachment = attachments[0]
    if attachment.optional or attachment.called:
        return None
    step, variant = _shortest(attachment), attachment.variant
    if step is None or not variant.beyond_weight(attachment.cfg, training=True):
        return step
    return None if variant.beyond_weight(attachment.cfg, training=False) else OutsideTraining(step)


def _shortest(attachment: Attachment) -> Step | None:
    variant = attachment.variant
    if isinstance(attachment.row_plan, Mixture):
        return None if variant.low_rank_factors is None else MixtureStep(attachment)
    if attachment.row_plan is not None:
        by_rows = variant.low_rank_factors is not None and variant.batched
        return RowsStep(attachment) if by_rows else None
    if variant.low_rank_factors is not None:
        return LowRankStep(attachment)
    return None if variant.dense is None else DenseStep(attachment)


def forward(self: Any, input: Tensor) -> Any:
    """nn.Linear's own call with the adapters in it."""
    step = self._ll.step
    if step is not None and not torch.compiler.is_dynamo_compiling():
        made = step(self, input)
        if made is not None:
            return made
    return activation_route.on_input(self, input)


def _operands(module: Any, x: Any, way: str | None) -> tuple[Tensor, Tensor | None] | None:
    """(W, bias) where the call is a plain product x W^T + b of constants; else None.

    A bias may come from elsewhere (computed, pruned, a buffer), tensors may be sparse or of another
    dtype, and what surrounds the call may need its operations one by one.
    """
    own = module._parameters
    W, b = own.get("weight"), own.get("bias")
    if type(x) is not Tensor or type(W) not in _DENSE or x.dtype is not W.dtype or way is None:
        return None
    if b is None and "bias" not in own:
        return None
    if not x.numel() or x.layout is not torch.strided or W.layout is not torch.strided:
        return None
    if not x.ndim or x.shape[-1] != W.shape[1]:
        # The layer itself says what is wrong.
        return None
    if torch.is_grad_enabled():
        if W.requires_grad or (b is not None and b.requires_grad):
            return None
        if torch.is_inference_mode_enabled():
            # An autograd function would keep tensors here, and plain calls don't.
            return None
    return W, b


@dataclass(frozen=True, eq=False)
class OutsideTraining:
    """A step of a method whose phases do more in training mode."""

    step: Step

    def __call__(self, module: Any, x: Any) -> Tensor | None:
        return None if module.training else self.step(module, x)


@dataclass(slots=True, eq=False)
class LowRankStep:
    """y = x W^T + b + s (drop(x) A^T) B^T, by `Variant.low_rank_factors`."""

    attachment: Attachment

    def __call__(self, module: Any, x: Any) -> Tensor | None:
        way, attachment = surroundings(), self.attachment
        operands = _operands(module, x, way)
        if operands is None:
            return None
        W, b = operands
        graph = torch.is_grad_enabled()
        dropout = attachment.dropout if module.training else 0.0
        if graph and way == "grad" and not dropout:
            # An autograd function costs more here than it saves.
            return None
        A, B, s = self._factors(module)
        if type(s) is not float or A.dtype is not x.dtype or B.dtype is not x.dtype:
            return None
        if not x.is_contiguous():
            return None
        if dropout or graph:
            if x.is_meta or is_watched():
                return None
            return low_rank(x, W, b, A, B, s, dropout, way == "grad")
        d_out, d_in = W.shape
        if x.numel() == d_in:
            return one_row(x, W, b, A, B, s)
        r, costs = A.shape[0], cost.costs_on(x.device)
        if costs is not None and x.dtype in _WIDE:
            dense_costs = d_in**2 * d_out * (r + costs.copied_weight)
            if x.numel() * (d_in + d_out) * r > dense_costs:
                return F.linear(x, torch.addmm(W, B, A, alpha=s), b)
        return linear_with_low_rank(x, W, b, A, B, s)[0]

    def _factors(self, module: Any) -> tuple[Tensor, Tensor, float | Tensor]:
        attachment = self.attachment
        p, site = attachment.p, attachment.site
        if p is None:
            leaves = leaves_at(module, attachment.slot)
            ready = None if module.training else ready_of(leaves)
            if ready is not None and ready.factors is not None:
                return ready.factors
            p = tensors_of(leaves)
        if SCALING in p:
            p, site = unfolded(p, site)
        assert attachment.variant.low_rank_factors is not None
        return attachment.variant.low_rank_factors(attachment.cfg, p, site)


@dataclass(slots=True, eq=False)
class RowsStep:
    """A low-rank update in which each row of the batch has an adapter of its own."""

    attachment: Attachment

    def __call__(self, module: Any, x: Any) -> Tensor | None:
        way, attachment = surroundings(), self.attachment
        operands = _operands(module, x, way)
        row_plan = attachment.row_plan
        assert isinstance(row_plan, RowPlan)
        if operands is None or not row_plan.known or not x.is_contiguous():
            return None
        graph = torch.is_grad_enabled()
        if (attachment.dropout and module.training) or (graph and way == "grad"):
            return None
        p = tensors_at(attachment, module)
        for name, t in p.items():
            if t.dtype is not x.dtype and name not in OF_MEMBERS:
                return None
        if graph and (x.is_meta or is_watched()):
            return None
        return _by_rows(attachment, p, *operands, x)


def _by_rows(
    attachment: Attachment, p: Params, W: Tensor, b: Tensor | None, x: Tensor
) -> Tensor | None:
    """The output where each row has a member of its own; None where the scale is differentiated.

    Raises:
        StructureError: the leading dimensions aren't the rows, or the tokens.
    """
    plan = attachment.row_plan
    assert isinstance(plan, RowPlan)
    plan = plan.at(x, attachment.site.path)
    assert attachment.variant.low_rank_factors is not None
    graph = torch.is_grad_enabled()
    q, site = unfolded(p, attachment.site)
    A, B, s = attachment.variant.low_rank_factors(attachment.cfg, q, site)
    # Only a factor pair as it is stored has zeros behind the ranks of a shorter member.
    banded = plan.ranks is not None and A.shape[1] == site.r
    rows = plan.flat(x, site.path)
    layout = plan.layout(rows, site.path, in_place=True, banded=banded)
    segments = layout.segments
    if banded:
        segments = tuple(
            segment for segment in segments if segment.ranks is None or segment.ranks[0] < site.r
        )
    if isinstance(s, Tensor):
        if graph and s.requires_grad:
            return None
        s = s.expand(A.shape[0]).view(-1, 1, 1)
    return plan.unflat(low_rank_by_rows(rows, W, b, A, B, s, layout, segments))


@dataclass(frozen=True, eq=False)
class MixtureStep:
    """A low-rank update in which each row of the batch, or each token, has a sum of several."""

    attachment: Attachment

    def __call__(self, module: Any, x: Any) -> Tensor | None:
        attachment, mixture = self.attachment, self.attachment.row_plan
        assert isinstance(mixture, Mixture)
        way = surroundings()
        operands = _operands(module, x, way)
        if operands is None or way != "eager" or (attachment.dropout and module.training):
            return None
        p = tensors_at(attachment, module)
        if any(t.dtype is not x.dtype for name, t in p.items() if name not in OF_MEMBERS):
            return None
        if torch.is_grad_enabled() and (x.is_meta or is_watched()):
            return None
        w = mixture.at(x, attachment.site.path)
        y = F.linear(x, *operands)
        return add_mixture(y, x, *stacked_factors(attachment, p), w, fresh=True)


@dataclass(slots=True, eq=False)
class DenseStep:
    """y = x W'^T + b' with the dense equivalent W', where the method says that it costs less."""

    attachment: Attachment

    def __call__(self, module: Any, x: Any) -> Tensor | None:
        attachment = self.attachment
        if attachment.dropout and module.training:
            return None
        operands = _operands(module, x, surroundings())
        if operands is None or x.dtype not in _WIDE:
            return None
        W, b = operands
        if x.numel() <= W.shape[1]:
            # On one row, W' costs more than any phases.
            return None
        variant, cfg, site = attachment.variant, attachment.cfg, attachment.site
        p = tensors_at(attachment, module)
        if any(t.dtype != x.dtype for t in p.values()):
            # W' would round what the phases keep.
            return None
        assert variant.dense is not None
        tokens = x.numel() // site.d_in
        if not cost.dense_pays(variant.dense(cfg, site, tokens), site, tokens, x.device):
            return None
        names = tuple(p)

        def make(W: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor | None]:
            own, at = unfolded(dict(zip(names, rest[: len(names)], strict=True)), site)
            assert variant.weight is not None
            return variant.weight(cfg, own, at, W, None if b is None else rest[-1])

        tensors = (W, *p.values()) if b is None else (W, *p.values(), b)
        if torch.is_grad_enabled():
            return recomputed_linear(make, x, tensors)
        return F.linear(x, *make(*tensors))
