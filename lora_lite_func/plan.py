"""How the rows of a batch are laid out by adapter: sorted once, cut into runs of like members. Ints and index tensors alone.

A run is a range of members with as many rows each: its leaves are a view of the stack, its rows a view of the sorted batch, so no
adapter is ever copied for a row. A member with fewer rows than its run repeats its own; what comes of the repeats is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from .errors import StructureError, UnsupportedError
from .modes import is_traced, is_watched

__all__ = ["Parts", "Plan", "Run", "Table", "not_rows", "parted"]

K = TypeVar("K")
V = TypeVar("V")

_CALL, _MEMBER = 20, 3
"""What a run and a member in it cost, in units of one row's token: rough times of a few calls, and of reading an adapter."""

_RANK = 45
"""What a product on a run costs beside what its rank does, in ranks (measured on a CPU: 41 us at rank 8, 89 us at rank 64)."""


class Run(NamedTuple):
    """Members `low` to `high` - 1, `width` rows each, from row `start` of the sorted batch.

    Attributes:
        rank: the largest among them; None where that isn't known or all members' are alike.
        whole: it is all of the stack and all of the sorted batch.
    """

    low: int
    high: int
    width: int
    start: int
    rank: int | None = None
    whole: bool = False


class Table(NamedTuple):
    """The layout of a batch.

    Attributes:
        runs: in the order of the sorted batch.
        bare: (start, stop) of the rows without an adapter in the sorted batch.
        take: (n,) which row goes where in the sorted batch; None where it is the batch itself.
        back: (N,) where each row is in the sorted batch; None likewise.
        members: (C,) whose leaves each of the one run's rows take, where they are gathered; None where runs are views.
        without: (N,) which rows have no adapter, beside `members`.
    """

    runs: tuple[Run, ...]
    bare: tuple[int, int]
    take: Tensor | None = None
    back: Tensor | None = None
    members: Tensor | None = None
    without: Tensor | None = None


class Parts(NamedTuple):
    """A batch cut into parts whose rows have the same adapters, for a call that has one weight for all its rows.

    Attributes:
        rows: of each part, in the order of the sorted batch.
        members: by plan, (parts,) whose leaves each takes; 0 where it has none.
        bare: by plan, which parts have none; all False where that isn't known.
        here: by plan, (parts,) bool, which parts have one, where that isn't known; None where it is.
        take: (N,) which row goes where in the sorted batch; None where it is the batch itself.
        back: (N,) where each row is in the sorted batch; None likewise.
    """

    rows: tuple[tuple[int, ...], ...]
    members: tuple[Tensor, ...]
    bare: tuple[tuple[bool, ...], ...]
    here: tuple[Tensor | None, ...]
    take: Tensor | None = None
    back: Tensor | None = None


class Plan:
    """Which adapter each row of a batch has.

    Attributes:
        ids: (N,) int64, -1 for the bare base.
        members: how many adapters there are.
        ranks: (members,) the largest rank each has anywhere; None where that isn't known or all are alike.
    """

    __slots__ = ("_ids", "_parts", "_tables", "ids", "members", "ranks", "rows")

    def __init__(self, ids: Tensor, members: int, known: Sequence[int] | None, ranks: Sequence[int] | None = None) -> None:
        self.ids, self.members, self.rows = ids, members, ids.shape[0]
        self.ranks = None if ranks is None or len(set(ranks)) == 1 else tuple(ranks)
        self._ids = None if known is None else tuple(known)
        self._tables: dict[tuple[int, bool, bool, torch.device], Table] = {}
        self._parts: dict[tuple[int, torch.device], Parts] = {}

    @property
    def known(self) -> bool:
        """Whether the ids' values are to be had: they aren't where they are traced, or under vmap."""
        return self._ids is not None

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Plan) and self._ids is not None and (self._ids, self.members) == (other._ids, other.members)

    def __hash__(self) -> int:
        return hash((self._ids, self.members))

    def __reduce__(self) -> tuple[object, ...]:
        return Plan, (self.ids, self.members, self._ids, self.ranks)

    def only(self, rows: Sequence[int]) -> Plan:
        """The plan of some of the rows."""
        known = None if self._ids is None else [self._ids[row] for row in rows]
        return Plan(torch.stack([self.ids[row] for row in rows]), self.members, known, self.ranks)

    def table(self, x: Tensor, path: str) -> Table:
        """The layout for a site's input.

        Args:
            x: (N, ..., d_in).
            path: the site's, for the message.

        Raises:
            StructureError: the leading dimension isn't the rows.
            UnsupportedError: torch.jit.trace records the call.
        """
        _check_untraced(f"site {path!r}: ")
        _check_rows(self, x, path)
        if self._ids is None or torch.compiler.is_compiling():
            return _traced(self.ids.to(x.device), self.members)
        return self._known(x, x.numel() // (max(self.rows, 1) * max(x.shape[-1], 1)) if x.is_floating_point() else x[:1].numel(), False)

    def ranked(self, x: Tensor, path: str) -> Table:
        """`table` for ids that are known, where a run costs by the largest rank in it, so that members of unlike ranks are better apart.

        Raises:
            StructureError: the leading dimension isn't the rows.
        """
        _check_rows(self, x, path)
        return self._known(x, x.numel() // (self.rows * x.shape[-1]), self.ranks is not None)

    def _known(self, x: Tensor, tokens: int, ranked: bool) -> Table:
        """The layout for `tokens` tokens a row, where ids are known; one serves sizes of a kind."""
        key = (tokens.bit_length() // 2, torch.is_grad_enabled(), ranked, x.device)
        ids, ranks = self._ids, self.ranks if ranked else None
        assert ids is not None
        return _once(self._tables, key, lambda: _laid_out(ids, self.members, 1 << (2 * key[0]), not key[1], x.device, ranks))


def _once(made: dict[K, V], key: K, make: Callable[[], V]) -> V:
    """What is made once for a key. It serves calls of every kind: its tensors are no inference mode's, of no transform, and made for the
    call alone where something sees each operation (and may put tensors of its own in their place)."""
    watched = is_watched()
    found = None if watched else made.get(key)
    if found is None:
        with torch.inference_mode(False), temporarily_clear_interpreter_stack():
            found = make()
        if not watched:
            made[key] = found
    return found


def _check_rows(plan: Plan, x: Tensor, path: str) -> None:
    if x.ndim == 0 or x.shape[0] != plan.rows:
        raise not_rows(path, x, plan.rows)


def _check_untraced(where: str = "") -> None:
    if is_traced():
        raise UnsupportedError(
            f"{where}torch.jit.trace has no record for rows with adapters of their own (it knows no vmap); use torch.export.export or "
            "torch.compile, or trace one adapter"
        )


def parted(plans: Sequence[Plan], device: torch.device) -> Parts:
    """The parts of a batch whose rows have an adapter by each of several plans; where ids are unknown each row is one.

    Args:
        plans: of as many rows each, at least one.
        device: of the index tensors.

    Raises:
        UnsupportedError: torch.jit.trace records the call.
    """
    _check_untraced()
    known = [plan._ids for plan in plans]
    if any(ids is None for ids in known) or torch.compiler.is_compiling():
        rows, ids = plans[0].rows, [plan.ids.to(device) for plan in plans]
        each = tuple((row,) for row in range(rows))
        return Parts(each, tuple(i.clamp(min=0) for i in ids), ((False,) * rows,) * len(plans), tuple(i >= 0 for i in ids))
    first = plans[0]
    if any(plan is not first for plan in plans):
        return _parts(list(zip(*known, strict=True)), len(plans), device)
    return _once(first._parts, (len(plans), device), lambda: _parts(list(zip(*known, strict=True)), len(plans), device))


def _parts(ids: Sequence[tuple[int, ...]], plans: int, device: torch.device) -> Parts:
    """Parts of rows whose ids, one for each plan, are known."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, members in enumerate(ids):
        groups.setdefault(members, []).append(row)
    used = sorted(groups)
    order = [row for members in used for row in groups[members]]
    columns = list(zip(*used, strict=True)) or [()] * plans
    sorted_already = order == list(range(len(order)))
    take = None if sorted_already else torch.tensor(order, dtype=torch.int64, device=device)
    return Parts(
        tuple(tuple(groups[members]) for members in used),
        tuple(torch.tensor([max(i, 0) for i in column], dtype=torch.int64, device=device) for column in columns),
        tuple(tuple(i < 0 for i in column) for column in columns),
        (None,) * plans,
        take,
        None if take is None else torch.argsort(take),
    )


def not_rows(path: str, x: Tensor, rows: int) -> StructureError:
    """The error for a tensor whose first dimension isn't the rows."""
    found = x.shape[0] if x.ndim else 0
    hint = ""
    if found and rows and found % rows == 0:
        hint = (
            f", {found // rows} for each of them; where all of the batch was repeated in place (beams, several sequences per prompt), "
            f"repeat each id: ids.repeat_interleave({found // rows}); where this layer alone sees tokens flattened into rows, others still "
            f"have {rows}"
        )
    return StructureError(
        f"site {path!r}: rows expects an input whose first dimension is the {rows} rows of the batch, found shape {tuple(x.shape)}{hint}. "
        "A layer that mixes rows (routed experts, flattened tokens, time first) can't tell them apart: leave it out with exclude_names, "
        "or call the model once per adapter"
    )


# --------------------------------------------------------------------------------------------------------- known ids
def _laid_out(ids: Sequence[int], members: int, tokens: int, idle: bool, device: torch.device, ranks: Sequence[int] | None) -> Table:
    """Runs of views for ids that are known.

    Args:
        ids: (N,).
        members: of the stack.
        tokens: per row.
        idle: whether a run may span members without rows (not where gradients are taken: theirs must be exactly zero).
        device: of the index tensors.
        ranks: of the members, if a run's cost depends on them.
    """
    groups: dict[int, list[int]] = {}
    for row, member in enumerate(ids):
        groups.setdefault(member, []).append(row)
    bare = groups.pop(-1, [])
    used = sorted(groups)
    chosen = _runs(used, [len(groups[k]) for k in used], tokens, idle, ranks)
    first = not (ids and ids[-1] == -1)  # bare rows go to the end that they are at
    order: list[int] = list(bare) if first else []
    back = [0] * len(ids)
    runs = []
    for low, high, width in chosen:
        runs.append(Run(low, high, width, len(order), None if ranks is None else max(ranks[low:high])))
        for member in range(low, high):
            own = groups.get(member, ())
            for row in own:
                back[row] = len(order)
                order.append(row)
            order.extend([own[0] if own else 0] * (width - len(own)))
    start = 0 if first else len(order)
    if not first:
        order.extend(bare)
    for i, row in enumerate(bare):
        back[row] = start + i
    span = (start, start + len(bare))
    if runs and not bare and (runs[0].low, runs[0].high) == (0, members):
        runs = [runs[0]._replace(whole=True)]
    if order == list(range(len(ids))):
        return Table(tuple(runs), span)
    take, place = (torch.tensor(t, dtype=torch.int64, device=device) for t in (order, back))
    return Table(tuple(runs), span, take, None if back == list(range(len(order))) else place)


def _runs(used: Sequence[int], counts: Sequence[int], tokens: int, idle: bool, ranks: Sequence[int] | None) -> list[tuple[int, int, int]]:
    """[(low, high, width)]: neighbours share a run where that is cheaper than a run each."""
    runs: list[tuple[int, int, int]] = []
    for member, count in zip(used, counts, strict=True):
        if runs:
            low, high, width = runs[-1]
            wide = max(width, count)
            apart = _cost(low, high, width, tokens, ranks) + _cost(member, member + 1, count, tokens, ranks)
            if (idle or member == high) and _cost(low, member + 1, wide, tokens, ranks) <= apart:
                runs[-1] = (low, member + 1, wide)
                continue
        runs.append((member, member + 1, count))
    return runs


def _cost(low: int, high: int, width: int, tokens: int, ranks: Sequence[int] | None) -> float:
    weight = 1.0 if ranks is None else (max(ranks[low:high]) + _RANK) / (2 * _RANK)
    return _CALL + (high - low) * (_MEMBER + width * tokens) * weight


# ------------------------------------------------------------------------------------------------------- unknown ids
def _traced(ids: Tensor, members: int) -> Table:
    """One run for ids whose values aren't to be had: shapes depend on the numbers of rows and members alone, so one graph serves
    every mix. Each `width` rows of a member are one of the run's, and leaves are gathered for those."""
    rows = ids.shape[0]
    safe = ids.clamp(min=0)
    width = max(1, rows // members)
    if width == 1:
        return Table((Run(0, rows, 1, 0),), (0, 0), members=safe, without=ids < 0)
    parts = rows // width + min(members, rows)  # as many as there can be
    order = torch.argsort(safe, stable=True)
    counts = torch.zeros(members, dtype=torch.int64, device=ids.device).scatter_add(0, safe, torch.ones_like(safe))
    each = (counts + width - 1) // width
    whole = each.cumsum(0)
    first, before = counts.cumsum(0) - counts, whole - each
    inside = safe[order]
    place = before[inside] * width + torch.arange(rows, device=ids.device) - first[inside]  # (N,) in the sorted batch
    owner = torch.searchsorted(whole, torch.arange(parts, device=ids.device), right=True).clamp(max=members - 1)
    own = order[first[owner].clamp(max=rows - 1)]  # a row of the same member to repeat
    take = own.repeat_interleave(width, output_size=parts * width).scatter(0, place, order)
    back = torch.zeros_like(order).scatter(0, order, place)
    return Table((Run(0, parts, width, 0),), (0, 0), take, back, owner, ids < 0)
