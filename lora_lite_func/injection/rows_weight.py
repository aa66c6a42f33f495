"""A module's own call on a batch whose rows have adapters of their own.

The module is called once for each adapter, on its rows and with its weights. For a norm or a linear
layer one call is mapped over groups of equal size instead. Other layers are called group by group:
their kernels are faster so, or have no rule for vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..core.errors import UnsupportedError
from ..core.site import Params
from ..core.torch_internals import BATCH_NORMS, CONVOLUTIONS, is_tracing_here
from ..kernels.row_axes import not_rows
from ..kernels.row_groups import RowGroups, in_groups
from ..kernels.row_plan import RowPlan
from .attachment import Attachment
from .batch_axes import PLAIN, Axis, check_apart, input_axes, output_axis
from .narrowing import Within, of_rows
from .rows_activation import mapped
from .state import tensors_at

__all__ = ["Chains", "by_adapters"]

Chains = Mapping[tuple[str, str], tuple[Attachment, ...]]
"""The adapters that go into each tensor that a module substitutes.

The keys are (name of the module's child, or "", name of the tensor).
"""


def _chosen(chains: Chains, own: Mapping[Any, Attachment | None]) -> Chains:
    """The chains with some of their adapters replaced, by (key, index); None leaves one out."""
    chosen = {}
    for key, attachments in chains.items():
        found = [own.get((key, i), attachment) for i, attachment in enumerate(attachments)]
        chosen[key] = tuple(attachment for attachment in found if attachment is not None)
    return chosen


def by_adapters(
    module: Any,
    chains: Chains,
    holder: Callable[[Any], Any],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The module's output, each row of it computed with the row's own adapters.

    Args:
        module: the site.
        chains: its adapters, some of them of a stack with a row plan.
        holder: gives, for the key of a chain, the module that holds its tensors.
        call: (chains, args, kwargs, within) -> the output, for adapters that all rows have;
            `within` is for what is inside the module.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.

    Raises:
        StructureError: a tensor hasn't the rows where it should.
        UnsupportedError: rows meet in the module, or it can't be told where they are in what comes
            to it or leaves it.
    """
    check_apart(module)
    mixed = {
        (key, i): attachment
        for key, attachments in chains.items()
        for i, attachment in enumerate(attachments)
        if attachment.row_plan is not None
    }
    plans = [
        attachment.row_plan
        for attachment in mixed.values()
        if isinstance(attachment.row_plan, RowPlan)
    ]
    flat, form = pytree.tree_flatten((args, kwargs))
    axes = input_axes(module, args, kwargs, flat, [plan.rows for plan in plans])
    lead = next((t for t, at in zip(flat, axes, strict=True) if at is not None))
    groups = in_groups(plans, lead.device)
    if not groups.rows:
        return call(_chosen(chains, dict.fromkeys(mixed)), args, kwargs)
    segments = _segments(groups, _maps(module))
    members = {
        at: _members(attachment, holder(at[0]), groups, n, segments)
        for n, (at, attachment) in enumerate(mixed.items())
    }
    cut = [
        [t] * len(segments) if at is None else _cut(t, at, groups, segments)
        for t, at in zip(flat, axes, strict=True)
    ]

    def one(own: Mapping[Any, Attachment | None], pieces: list[Any], within: Within | None) -> Any:
        return call(_chosen(chains, own), *pytree.tree_unflatten(pieces, form), within)

    made = []
    for n, (low, high) in enumerate(segments):
        own = {at: attachments[n] for at, attachments in members.items()}
        pieces = [column[n] for column in cut]
        if high - low > 1:
            made.append(_together(one, own, pieces, [at is not None for at in axes], high - low))
        else:
            within = None if len(segments) == 1 else of_rows(groups.rows[low])
            made.append(one(own, pieces, within))
    if len(made) == 1 and groups.back is None:
        return made[0]
    return _joined(module, made, groups, segments)


def _maps(module: Any) -> bool:
    """Whether a module's call is better mapped over groups of equal size.

    It is where the module has a rule for vmap, and no kernel that is faster group by group.
    """
    if isinstance(module, CONVOLUTIONS):
        return is_tracing_here()
    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, BATCH_NORMS)
    own = module._ll.substituted.get("weight", ())
    return isinstance(module, (*norms, nn.Linear)) or any(
        attachment.site.kind == "norm" for attachment in own
    )


def _segments(groups: RowGroups, maps: bool) -> list[tuple[int, int]]:
    """Segments of neighbouring groups, as [(low, high)].

    A segment is one group, or neighbouring groups that have as many rows and adapters for the same
    plans.
    """
    if not maps:
        return [(n, n + 1) for n in range(len(groups.rows))]
    segments: list[tuple[int, int]] = []
    kinds = [(len(rows), *(bare[n] for bare in groups.bare)) for n, rows in enumerate(groups.rows)]
    for n, kind in enumerate(kinds):
        if segments and kinds[segments[-1][0]] == kind:
            segments[-1] = (segments[-1][0], n + 1)
        else:
            segments.append((n, n + 1))
    return segments


def _members(
    attachment: Attachment,
    module: Any,
    groups: RowGroups,
    plan: int,
    segments: Sequence[tuple[int, int]],
) -> list[Attachment | None]:
    """The adapter of each segment, or None where the segment has none.

    In a segment of several groups the adapter's tensors have a leading axis of groups.
    """
    index, bare, here = groups.members[plan], groups.bare[plan], groups.here[plan]
    sizes = [high - low for low, high in segments]

    def split(t: Tensor) -> list[Tensor]:
        return [piece.squeeze(0) if piece.shape[0] == 1 else piece for piece in t.split(sizes)]

    leaves = {
        name: split(t.index_select(0, index.to(t.device)))
        for name, t in tensors_at(attachment, module).items()
    }
    flags = [None] * len(segments) if here is None else split(here)
    own: list[Params] = [{name: ts[n] for name, ts in leaves.items()} for n in range(len(segments))]
    return [
        None if bare[low] else attachment.changed(p=own[n], row_plan=None, here=flags[n])
        for n, (low, _) in enumerate(segments)
    ]


def _together(
    one: Callable[..., Any],
    own: Mapping[Any, Attachment | None],
    pieces: list[Any],
    has_rows: list[bool],
    count: int,
) -> Any:
    """The call, mapped over groups that have as many rows."""
    present = {at: attachment for at, attachment in own.items() if attachment is not None}
    rows = [t.unflatten(0, (count, -1)) for t, there in zip(pieces, has_rows, strict=True) if there]

    def of_group(leaves: list[Params], here: list[Tensor | None], *rows: Tensor) -> Any:
        it = iter(rows)
        attachments = {
            at: attachment.changed(p=p, here=h)
            for (at, attachment), p, h in zip(present.items(), leaves, here, strict=True)
        }
        return one(
            {**own, **attachments},
            [next(it) if there else t for t, there in zip(pieces, has_rows, strict=True)],
            None,
        )

    return mapped(
        of_group,
        [attachment.p for attachment in present.values()],
        [attachment.here for attachment in present.values()],
        *rows,
    ).flatten(0, 1)


def _cut(
    t: Tensor, at: Axis, groups: RowGroups, segments: Sequence[tuple[int, int]]
) -> Sequence[Tensor]:
    """A tensor's rows, cut into segments."""
    dim, each = at
    sizes = [size * each for size in _sizes(groups, segments)]
    if groups.take is None:
        return t.split(sizes, dim)
    take = groups.take.to(t.device)
    if each > 1:
        take = (take[:, None] * each + torch.arange(each, device=t.device)).flatten()
    return t.index_select(dim, take).split(sizes, dim)


def _sizes(groups: RowGroups, segments: Sequence[tuple[int, int]]) -> list[int]:
    return [sum(map(len, groups.rows[low:high])) for low, high in segments]


def _joined(
    module: Any, made: list[Any], groups: RowGroups, segments: Sequence[tuple[int, int]]
) -> Any:
    """Put the outputs of the segments together, each row where it was."""
    columns, forms = zip(*map(pytree.tree_flatten, made), strict=True)
    path, kind = module._ll.path, type(module).__name__
    joined: list[Any] = []
    for n, column in enumerate(zip(*columns, strict=True)):
        if not isinstance(column[0], Tensor):
            if not isinstance(column[0], PLAIN) or any(value != column[0] for value in column):
                raise UnsupportedError(
                    f"{path!r} ({kind}): {_OUTPUT.format(type(column[0]).__name__)}"
                )
            joined.append(column[0])
            continue
        dim = output_axis(module, n)
        for t, size in zip(column, _sizes(groups, segments), strict=True):
            if t.ndim <= dim or t.shape[dim] != size:
                raise not_rows(path, t, size)
        whole = torch.cat(column, dim)
        joined.append(
            whole if groups.back is None else whole.index_select(dim, groups.back.to(whole.device))
        )
    return pytree.tree_unflatten(joined, forms[0])


_OUTPUT = (
    "its output holds a {}, in which the rows of several adapters can't be told apart; "
    "leave it out with exclude_names"
)
