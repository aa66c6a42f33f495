"""A batch's rows sorted by adapter and cut into segments of neighbouring members.

A segment is a range of members with as many rows each. Its leaves are a view of the stack, its rows
a view of the sorted batch, so no adapter is ever copied for a row. A member with fewer rows than
its segment repeats its own; what comes of the repeats is dropped. Ints and index tensors alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .bands import rank_bands
from .cost import Costs, costs_on

__all__ = ["Segment", "SegmentLayout", "laid_out", "traced"]


class Segment(NamedTuple):
    """Members `low` to `high` - 1, `width` rows each, from row `start` of the sorted batch.

    Attributes:
        low: its first member.
        high: one more than its last.
        width: rows of each member.
        start: its first row.
        ranks: (first, last) the ranks of its members that it covers; None for all of them.
        whole: it is all of the stack and all of the sorted batch.
    """

    low: int
    high: int
    width: int
    start: int
    ranks: tuple[int, int] | None = None
    whole: bool = False


class SegmentLayout(NamedTuple):
    """The layout of a batch.

    Attributes:
        segments: in the order of the sorted batch. Each row is in one, or in several of different
            ranks.
        bare: (start, stop) of the rows without an adapter in the sorted batch.
        take: (n,) which row goes where in the sorted batch; None where it is the batch itself.
        back: (N,) where each row is in the sorted batch; None likewise.
        members: (C,) where leaves are gathered, the member that each of the one segment's rows
            takes them from; None where segments are views.
        without: (N,) which rows have no adapter, where leaves are gathered.
    """

    segments: tuple[Segment, ...]
    bare: tuple[int, int]
    take: Tensor | None = None
    back: Tensor | None = None
    members: Tensor | None = None
    without: Tensor | None = None


# ---------------------------------------------------------------------------------------- known ids
def laid_out(
    ids: Sequence[int],
    members: int,
    tokens: int,
    idle: bool,
    device: torch.device,
    in_place: bool = False,
    ranks: Sequence[int] | None = None,
) -> SegmentLayout:
    """Segments as views, for ids that are known.

    Args:
        ids: (N,).
        members: how many members the stack has.
        tokens: how many tokens a row has.
        idle: whether a segment may span members without rows. It may not where gradients are
            taken, since the gradients of such members must be exactly zero.
        device: where the index tensors go.
        in_place: whether segments are written onto the batch, so that repeated rows would cost
            passes over all of it.
        ranks: the ranks of the members, where segments are to be cut by them.
    """
    groups: dict[int, list[int]] = {}
    for row, member in enumerate(ids):
        groups.setdefault(member, []).append(row)
    bare = groups.pop(-1, [])
    used = sorted(groups)
    counts = [len(groups[k]) for k in used]
    costs = costs_on(device)
    chosen = _chosen(used, counts, tokens, idle, in_place, costs)
    bare_first = not (ids and ids[-1] == -1)  # bare rows stay at the end where they are
    starts, order, back, start = _sorted_rows(groups, chosen, bare, bare_first)
    segments: list[Segment] = []
    for (low, high, width), at in zip(chosen, starts, strict=True):
        segment = Segment(low, high, width, at)
        if ranks is None or costs is None:
            segments.append(segment)
        else:
            segments += _banded(segment, ranks, tokens, costs)
    span = (start, start + len(bare))
    if not bare and chosen and chosen[0][:2] == (0, members):
        segments = [
            segment._replace(whole=(segment.low, segment.high) == (0, members))
            for segment in segments
        ]
    if order == list(range(len(ids))):
        return SegmentLayout(tuple(segments), span)
    take, places = (torch.tensor(t, dtype=torch.int64, device=device) for t in (order, back))
    return SegmentLayout(
        tuple(segments), span, take, None if back == list(range(len(order))) else places
    )


def _sorted_rows(
    groups: Mapping[int, Sequence[int]],
    chosen: Sequence[tuple[int, int, int]],
    bare: Sequence[int],
    bare_first: bool,
) -> tuple[list[int], list[int], list[int], int]:
    """The sorted batch: (where each segment begins, which row stands at each place, where each row
    stands itself, where the bare rows begin).
    """
    starts: list[int] = []
    order: list[int] = list(bare) if bare_first else []
    places = {row: place for place, row in enumerate(order)}
    for low, high, width in chosen:
        starts.append(len(order))
        for member in range(low, high):
            own = groups.get(member, ())
            places |= {row: len(order) + i for i, row in enumerate(own)}
            order += own
            order += [own[0] if own else 0] * (width - len(own))
    begin = 0 if bare_first else len(order)
    if not bare_first:
        places |= {row: begin + i for i, row in enumerate(bare)}
        order += bare
    return starts, order, [places[row] for row in range(len(places))], begin


def _chosen(
    used: Sequence[int],
    counts: Sequence[int],
    tokens: int,
    idle: bool,
    in_place: bool,
    costs: Costs | None,
) -> list[tuple[int, int, int]]:
    """[(low, high, width)] of the segments; where nothing was measured no row is repeated."""
    alike = _alike(used, counts)
    if costs is None or (in_place and not idle):
        return alike  # repeated rows have no gradient in place
    joined = _joined(used, counts, tokens, idle, costs)
    if not in_place:
        return joined
    slots = sum((high - low) * width for low, high, width in joined)
    copies = (slots + sum(counts)) * tokens // costs.copies
    return (
        alike if _total(alike, tokens, costs) <= _total(joined, tokens, costs) + copies else joined
    )


def _joined(
    used: Sequence[int], counts: Sequence[int], tokens: int, idle: bool, costs: Costs
) -> list[tuple[int, int, int]]:
    """[(low, high, width)]: neighbours share a segment where that is cheaper than one each."""
    segments: list[tuple[int, int, int]] = []
    for member, count in zip(used, counts, strict=True):
        if segments and (idle or member == segments[-1][1]):
            low, _, width = segments[-1]
            joined = (low, member + 1, max(width, count))
            apart = [segments[-1], (member, member + 1, count)]
            if _total([joined], tokens, costs) <= _total(apart, tokens, costs):
                segments[-1] = joined
                continue
        segments.append((member, member + 1, count))
    return segments


def _alike(used: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """[(low, high, width)]: neighbours share a segment where they have as many rows, so that no
    row is repeated.
    """
    segments: list[tuple[int, int, int]] = []
    for member, count in zip(used, counts, strict=True):
        if segments and segments[-1][1:] == (member, count):
            segments[-1] = (segments[-1][0], member + 1, count)
        else:
            segments.append((member, member + 1, count))
    return segments


def _total(segments: Sequence[tuple[int, int, int]], tokens: int, costs: Costs) -> int:
    return sum(
        costs.segment + (high - low) * (costs.member + width * tokens)
        for low, high, width in segments
    )


def _banded(segment: Segment, ranks: Sequence[int], tokens: int, costs: Costs) -> list[Segment]:
    """A segment as several on its rows, cut by ranks."""
    return [
        Segment(
            band.low,
            band.high,
            segment.width,
            segment.start + (band.low - segment.low) * segment.width,
            (band.first, band.last),
        )
        for band in rank_bands(
            ranks, segment.low, segment.high, segment.width * tokens, costs=costs
        )
    ]


# -------------------------------------------------------------------------------------- unknown ids
def traced(ids: Tensor, members: int) -> SegmentLayout:
    """One segment for ids without values. Its shapes depend on the numbers of rows and members
    alone, so one graph serves every mix.

    Each `width` rows of a member make a part of the segment, and leaves are gathered for the parts.
    """
    rows = ids.shape[0]
    safe = ids.clamp(min=0)
    width = max(1, rows // members)
    if width == 1:
        return SegmentLayout((Segment(0, rows, 1, 0),), (0, 0), members=safe, without=ids < 0)
    parts = rows // width + min(members, rows)  # the largest number that there can be
    order = torch.argsort(safe, stable=True)
    counts = torch.zeros(members, dtype=torch.int64, device=ids.device).scatter_add(
        0, safe, torch.ones_like(safe)
    )
    each = (counts + width - 1) // width
    whole = each.cumsum(0)
    first, before = counts.cumsum(0) - counts, whole - each
    inside = safe[order]
    nth = torch.arange(rows, device=ids.device) - first[inside]  # which of its member's rows
    place = before[inside] * width + nth  # (N,) the row's place in the sorted batch
    # The zeros give it the batch of ids under vmap; searchsorted warns of what it would expand.
    part = torch.arange(parts, device=ids.device) + torch.zeros_like(whole[:1])
    owner = torch.searchsorted(whole, part, right=True).clamp(max=members - 1)
    own = order[first[owner].clamp(max=rows - 1)]  # a row of the same member to repeat
    take = own.repeat_interleave(width, output_size=parts * width).scatter(0, place, order)
    back = torch.zeros_like(order).scatter(0, order, place)
    return SegmentLayout((Segment(0, parts, width, 0),), (0, 0), take, back, owner, ids < 0)
