"""A method's phases on a batch whose rows have adapters of their own.

The phases run segment by segment over the members. The frozen layer runs once on all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.site import Params
from ..core.stacked import unfolded
from ..core.torch_internals import without_autocast
from ..kernels.dropout import dropped
from ..kernels.row_axes import not_rows
from ..kernels.row_plan import RowPlan
from ..kernels.segments import Segment, SegmentLayout
from ..layers.kinds import KINDS
from .attachment import Attachment

__all__ = ["by_rows", "mapped"]


class _Rows:
    """One stack at one site, for one call.

    It holds the leaves of the members and what `prepare` makes of them, segment by segment.
    """

    def __init__(
        self, attachment: Attachment, p: Params, layer: Any, layout: SegmentLayout
    ) -> None:
        self.attachment, self.layer = attachment, layer
        if layout.members is not None:
            p = {name: t.index_select(0, layout.members) for name, t in p.items()}
        self.parts = [self._cut(p, segment) for segment in layout.segments]
        self.prepared = [
            self._prepare(q, segment)
            for q, segment in zip(self.parts, layout.segments, strict=True)
        ]

    def _cut(self, p: Params, segment: Segment) -> Params:
        """The leaves of the segment's own members.

        They are views: where the segment is the whole stack, their gradients are written once.
        """
        count = next(iter(p.values())).shape[0]
        if segment.high - segment.low == count:
            return p if count > 1 else {name: t.squeeze(0) for name, t in p.items()}
        if segment.high - segment.low == 1:
            return {name: t[segment.low] for name, t in p.items()}
        return {name: t[segment.low : segment.high] for name, t in p.items()}

    def _prepare(self, p: Params, segment: Segment) -> Any:
        """What `prepare` gives for the segment's members, made once for each."""
        variant, cfg, site = self.attachment.variant, self.attachment.cfg, self.attachment.site
        prepare = variant.prepare
        if prepare is None:
            return None

        def one(p: Params) -> Any:
            q, at = unfolded(p, site)
            return without_autocast(
                next(iter(q.values())).device.type, prepare, cfg, q, at, self.layer
            )

        if segment.high - segment.low == 1 or variant.batched:
            return one(p)
        if self.layer.is_plain:
            return mapped(one, p)
        # A packed layer has no rule for vmap, so its members are prepared one by one.
        return _piled(
            [one({name: t[i] for name, t in p.items()}) for i in range(segment.high - segment.low)]
        )

    def call(
        self, phase: Callable[..., Tensor], layout: SegmentLayout, *batches: Tensor
    ) -> list[Tensor]:
        """Run the phase on the rows of every segment of the sorted batches."""
        variant, cfg, site = self.attachment.variant, self.attachment.cfg, self.attachment.site

        def one(p: Params, d: Any, *rows: Tensor) -> Tensor:
            q, at = unfolded(p, site)
            return phase(cfg, q, d, *rows, at)

        made = []
        for p, d, segment in zip(self.parts, self.prepared, layout.segments, strict=True):
            count, width, start = segment.high - segment.low, segment.width, segment.start
            rows = [
                b if b.shape[0] == count * width else b.narrow(0, start, count * width)
                for b in batches
            ]
            if count == 1:
                made.append(one(p, d, *rows))
                continue
            rows = [b.unflatten(0, (count, width)) for b in rows]
            together = variant.batched and rows[0].is_floating_point()
            made.append((one(p, d, *rows) if together else mapped(one, p, d, *rows)).flatten(0, 1))
        return made


def by_rows(
    attachment: Attachment,
    p: Params,
    layer: Any,
    training: bool,
    inner: Callable[[Tensor], Any],
    hidden: Callable[..., Any],
    x: Tensor,
) -> Any:
    """The site's output, where each row of the batch has an adapter of its own.

    What is underneath runs once on the whole batch. The method's phases run on each adapter's own
    rows.

    Args:
        attachment: the method at the site, with the row plan.
        p: its tensors, each with a leading axis of members.
        layer: what `prepare` may see; its `is_plain` says whether `prepare` may run under vmap.
        training: whether to drop out.
        inner: the layer with the adapters before this one.
        hidden: (attachment, its output, x) -> (what `outputs` changes, how to put that back, what
            it gets for x).
        x: (N, ..., d_in), or (N, T, ..., d_in) where each token has an adapter.

    Raises:
        StructureError: the leading dimensions aren't the rows, or the tokens.
        UnsupportedError: the layer's output isn't one tensor, or the site is a whole module and
            each token has an adapter.
    """
    variant, site, plan = attachment.variant, attachment.site, attachment.row_plan
    assert isinstance(plan, RowPlan)
    plan = plan.at(x, site.path)
    if plan.by_token and KINDS[site.kind].listed:
        raise UnsupportedError(
            f"site {site.path!r}: {variant.name} changes a whole module's output, in which it may "
            f"read other tokens, so it can't be another one for each token; leave it out with "
            f"exclude_names, or give an id for each row"
        )
    flat = plan.flat(x, site.path)
    layout = plan.layout(flat, site.path)
    if not layout.segments:
        return inner(x)
    rows = _Rows(attachment, p, layer, layout)
    X = flat if layout.take is None else flat.index_select(0, layout.take)
    if variant.inputs is None:
        y = inner(x)
    else:
        y = inner(plan.unflat(_joined(rows.call(variant.inputs, layout, X), layout, X, flat)))
    if variant.outputs is None:
        return y
    h, put, seen = hidden(attachment, y, x)
    if not isinstance(h, Tensor):
        raise UnsupportedError(
            f"site {site.path!r}: its output is a {type(h).__name__}, whose rows can't be told "
            f"apart; leave it out"
        )
    if h.shape[: len(plan.shape)] != x.shape[: len(plan.shape)]:
        raise not_rows(site.path, h, plan.rows)
    h = h.flatten(0, 1) if plan.by_token else h
    H = h if layout.take is None else h.index_select(0, layout.take)
    # Dropout comes before the sort, so that the mask doesn't depend on how the rows are mixed.
    if attachment.dropout and training:
        seen = dropped(seen, attachment.dropout)
    if seen is not x:
        seen = seen.flatten(0, 1) if plan.by_token else seen
        X = seen if layout.take is None else seen.index_select(0, layout.take)
    if attachment.seen is not None:
        attachment.seen.add(site.path, plan.unflat(_router(rows, layout, X, H, h)))
    return put(plan.unflat(_joined(rows.call(variant.outputs, layout, X, H), layout, H, h)))


def _router(rows: _Rows, layout: SegmentLayout, X: Tensor, H: Tensor, h: Tensor) -> Tensor:
    """What the members' routers say of their rows, (N, ..., E), and zero for bare rows.

    Args:
        rows: the stack at the site.
        layout: which rows are whose.
        X: what comes to the method, sorted.
        H: what comes out of the layer, sorted.
        h: the same in the order of the batch.
    """
    router = rows.attachment.variant.router
    assert router is not None
    made = rows.call(router, layout, X)
    nothing, none = (made[0].new_zeros(*t.shape[:-1], made[0].shape[-1]) for t in (H, h))
    return _joined(made, layout, nothing, none)


def _joined(
    made: list[Tensor], layout: SegmentLayout, sorted_batch: Tensor, batch: Tensor
) -> Tensor:
    """Put the results of the segments and the bare rows together, each row where it was."""
    start, stop = layout.bare
    if stop > start:
        made.insert(0 if start == 0 else len(made), sorted_batch.narrow(0, start, stop - start))
    out = made[0] if len(made) == 1 else torch.cat(made)
    out = out if layout.back is None else out.index_select(0, layout.back)
    if layout.without is None:
        return out
    return torch.where(layout.without.view(-1, *[1] * (out.ndim - 1)), batch, out)


# ------------------------------------------------------------------------------------ vmap on trees
def mapped(f: Callable[..., Any], *trees: Any) -> Any:
    """Map f over the leading axis of every tensor in the trees.

    What isn't a tensor passes through unchanged, in the arguments and in the result.
    """
    flat, spec = pytree.tree_flatten(trees)
    tensors = [t for t in flat if isinstance(t, Tensor)]
    out: list[Any] = []

    def on_tensors(*members: Tensor) -> tuple[Tensor, ...]:
        it = iter(members)
        result, form = pytree.tree_flatten(
            f(
                *pytree.tree_unflatten(
                    [next(it) if isinstance(t, Tensor) else t for t in flat], spec
                )
            )
        )
        out[:] = [form, result]
        return tuple(t for t in result if isinstance(t, Tensor))

    results = iter(torch.func.vmap(on_tensors, randomness="different")(*tensors))
    return pytree.tree_unflatten(
        [next(results) if isinstance(t, Tensor) else t for t in out[1]], out[0]
    )


def _piled(trees: list[Any]) -> Any:
    """Trees of the same form as one tree, with their tensors stacked."""
    flat, forms = zip(*map(pytree.tree_flatten, trees), strict=True)
    columns = zip(*flat, strict=True)
    return pytree.tree_unflatten(
        [torch.stack(c) if isinstance(c[0], Tensor) else c[0] for c in columns], forms[0]
    )
