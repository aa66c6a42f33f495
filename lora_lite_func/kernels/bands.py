"""Members of unlike ranks in one segment: a band of leading ranks for all of them, more for some.

An update of rank r is the sum of its bands, s B A = s (B[:, :c] A[:c] + B[:, c:] A[c:]), so no
member is multiplied at another's rank. Ints alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from .cost import CPU, Costs

__all__ = ["RankBand", "rank_bands"]


class RankBand(NamedTuple):
    """Ranks `first` to `last` - 1 of members `low` to `high` - 1."""

    low: int
    high: int
    first: int
    last: int


def rank_bands(
    ranks: Sequence[int], low: int, high: int, rows: int, first: int = 0, costs: Costs = CPU
) -> list[RankBand]:
    """Bands that hold every rank of members `low` to `high` - 1 once, found by single cuts.

    Each cut either puts a band under all members, or sets those of higher ranks apart; cuts go on
    while they make the whole cheaper.

    Args:
        ranks: the ranks of all members.
        low: the segment's first member.
        high: one more than its last.
        rows: how many rows a member has, tokens included.
        first: the rank to begin at.
        costs: the costs of the device.
    """
    whole = RankBand(low, high, first, max(ranks[low:high]))
    best, chosen = _cost(whole, rows, costs), None
    for cut in sorted({r for r in ranks[low:high] if first < r < whole.last}):
        apart = list(_apart(ranks, low, high, first, cut))
        more = [RankBand(b.low, b.high, cut, b.last) for b in apart if b.last > cut]
        for done, parts in (([RankBand(low, high, first, cut)], more), ([], apart)):
            cost = sum(_cost(band, rows, costs) for band in (*done, *parts))
            if cost < best:
                best, chosen = cost, (done, parts)
    if chosen is None:
        return [whole]
    done, parts = chosen
    return [
        *done,
        *(
            band
            for part in parts
            for band in rank_bands(ranks, part.low, part.high, rows, part.first, costs)
        ),
    ]


def _apart(ranks: Sequence[int], low: int, high: int, first: int, cut: int) -> Iterator[RankBand]:
    """Bands of neighbours whose ranks are either all above the cut or all at most the cut."""
    for _, group in groupby(range(low, high), lambda member: ranks[member] > cut):
        members = list(group)
        yield RankBand(members[0], members[-1] + 1, first, max(ranks[members[0] : members[-1] + 1]))


def _cost(band: RankBand, rows: int, costs: Costs) -> float:
    """What a band costs, in units of a row at rank `costs.band_rank`.

    One member more than there are is counted, since members are shared out among threads.
    """
    members = band.high - band.low + 1
    rank = (band.last - band.first + costs.band_rank) / (2 * costs.band_rank)
    return costs.band + members * (costs.band_member + rows) * rank
