"""A batch cut into groups of rows with the same adapters, for calls with one weight per group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.torch_internals import is_traced, is_tracing_here, is_watched
from .row_axes import untraceable
from .row_plan import RowPlan, once

__all__ = ["RowGroups", "in_groups"]


class RowGroups(NamedTuple):
    """A batch cut into groups whose rows have the same adapters.

    Attributes:
        rows: the rows of each group, in the order of the sorted batch.
        members: for each plan, (groups,) the member whose leaves a group takes; 0 where there is
            none.
        bare: for each plan, which groups have no member; all False where ids are unknown.
        here: for each plan, (groups,) bool, which groups have a member; None where ids are known.
        take: (N,) which row goes where in the sorted batch; None where it is the batch itself.
        back: (N,) where each row is in the sorted batch; None likewise.
    """

    rows: tuple[tuple[int, ...], ...]
    members: tuple[Tensor, ...]
    bare: tuple[tuple[bool, ...], ...]
    here: tuple[Tensor | None, ...]
    take: Tensor | None = None
    back: Tensor | None = None


def in_groups(plans: Sequence[RowPlan], device: torch.device) -> RowGroups:
    """A batch in groups, where each row has an adapter by each of several plans. Where ids are
    unknown each row is a group of its own.

    Args:
        plans: at least one, all with the same number of rows.
        device: where the index tensors go.

    Raises:
        UnsupportedError: torch.jit.trace records the call.
    """
    if is_traced():
        raise untraceable()
    known = [plan.known_ids for plan in plans]
    if any(ids is None for ids in known) or is_tracing_here():
        rows, ids = plans[0].rows, [plan.ids.to(device) for plan in plans]
        each = tuple((row,) for row in range(rows))
        return RowGroups(
            each,
            tuple(i.clamp(min=0) for i in ids),
            ((False,) * rows,) * len(plans),
            tuple(i >= 0 for i in ids),
        )
    first = plans[0]
    if any(plan is not first for plan in plans):
        return _by_known_ids(list(zip(*known, strict=True)), len(plans), device)
    made: RowGroups = once(
        first.groups,
        (len(plans), device),
        lambda: _by_known_ids(list(zip(*known, strict=True)), len(plans), device),
        is_watched(),
    )
    return made


def _by_known_ids(ids: Sequence[tuple[int, ...]], plans: int, device: torch.device) -> RowGroups:
    """Groups of rows whose ids, one for each plan, are known."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, members in enumerate(ids):
        groups.setdefault(members, []).append(row)
    used = sorted(groups)
    order = [row for members in used for row in groups[members]]
    columns = list(zip(*used, strict=True)) or [()] * plans
    sorted_already = order == list(range(len(order)))
    take = None if sorted_already else torch.tensor(order, dtype=torch.int64, device=device)
    return RowGroups(
        tuple(tuple(groups[members]) for members in used),
        tuple(
            torch.tensor([max(i, 0) for i in column], dtype=torch.int64, device=device)
            for column in columns
        ),
        tuple(tuple(i < 0 for i in column) for column in columns),
        (None,) * plans,
        take,
        None if take is None else torch.argsort(take),
    )
