"""RowPlan: which adapter each row of a batch has, or each token, and the layouts that follow."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.layout import Layout
from ..core.torch_internals import is_traced, is_tracing_here, is_watched, outside_transforms
from .row_axes import batch_axes, not_rows, untraceable
from .segments import SegmentLayout, laid_out, traced

__all__ = ["BARE", "RowPlan", "once"]

BARE = -1
"""The id of a row that has no adapter."""

K = TypeVar("K")
V = TypeVar("V")


class RowPlan:
    """Which adapter each row of a batch has, or each token of it.

    Where each token has its own, tokens are rows: (N, T, d) is taken as (N T, d).

    Attributes:
        ids: (rows,) int64, -1 for the bare base.
        shape: (N,) where each row has an adapter, (N, T) where each token has one.
        rows: N, or N T.
        members: how many adapters there are.
        known_ids: the ids as ints; None where they have no values.
        known: whether the ids have values, which they lack in a traced call and under vmap.
        groups: the batch in groups (row_groups.py), by the number of plans and the device.
        ranks: (members,) the largest rank that each has anywhere; None where all are alike or that
            isn't known.
        goes_on: whether more tokens may follow those of the ids. They have the last id of their
            row.
        flattened: patterns of the paths whose inputs have all tokens in one dimension, row by row.
    """

    __slots__ = (
        "_flat",
        "_later",
        "_layouts",
        "_without",
        "flattened",
        "goes_on",
        "groups",
        "ids",
        "known",
        "known_ids",
        "members",
        "ranks",
        "rows",
        "shape",
    )

    def __init__(
        self,
        ids: Tensor,
        members: int,
        known: Sequence[int] | None,
        ranks: Sequence[int] | None = None,
        goes_on: bool = False,
        flattened: tuple[str, ...] = (),
    ) -> None:
        self.goes_on, self.flattened = goes_on, flattened
        self._flat: dict[int, RowPlan] = {}
        self._later: RowPlan | None = None
        self.shape = tuple(ids.shape)
        self.ids, self.members, self.rows = ids.reshape(-1), members, ids.numel()
        self.ranks = None if ranks is None or len(set(ranks)) == 1 else tuple(ranks)
        self.known_ids = None if known is None else tuple(known)
        self.known = self.known_ids is not None
        self._layouts: dict[tuple[int, bool, bool, bool, torch.device], SegmentLayout] = {}
        self.groups: dict[tuple[int, torch.device], Any] = {}
        self._without: dict[frozenset[int], RowPlan] = {}

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, RowPlan)
            and self.known_ids is not None
            and self._static() == other._static()
        )

    def __hash__(self) -> int:
        return hash(self._static())

    def _static(self) -> tuple[object, ...]:
        return self.known_ids, self.shape, self.members, self.goes_on, self.flattened

    def __reduce__(self) -> tuple[object, ...]:
        return RowPlan, (
            self.ids.view(self.shape),
            self.members,
            self.known_ids,
            self.ranks,
            self.goes_on,
            self.flattened,
        )

    @property
    def by_token(self) -> bool:
        """Whether each token has an adapter, rather than each row."""
        return len(self.shape) > 1

    def only(self, rows: Sequence[int]) -> RowPlan:
        """The plan for some rows of the batch."""
        ids, each = self.ids.view(self.shape), math.prod(self.shape[1:])
        known = None
        if self.known_ids is not None:
            known = [i for row in rows for i in self.known_ids[row * each : (row + 1) * each]]
        own = torch.stack([ids[row] for row in rows])
        return RowPlan(own, self.members, known, self.ranks, self.goes_on, self.flattened)

    def at(self, x: Tensor, path: str) -> RowPlan:
        """The plan for a site's input: this one, or one whose rows are the tokens where the site
        has them flattened.
        """
        if self.flattened and any(re.search(pattern, path) for pattern in self.flattened):
            return self._of_flattened(x)
        return self.fitting(x)

    def fitting(self, x: Tensor) -> RowPlan:
        """The plan for an input (N, tokens, ...). Where tokens go on it has as many tokens as x.

        Fewer tokens than ids are those of a step that goes on from a cache.
        """
        if not self.goes_on or x.ndim < 2 or x.shape[0] != self.shape[0]:
            return self
        tokens, had, later = x.shape[1], self.shape[1], self._later
        if tokens == had:
            return self
        if later is not None and later.shape[1] == tokens:
            return later
        kept = had if tokens > had else 0
        at = [
            *range(kept),
            *[had - 1] * (tokens - kept),
        ]  # each token's position among its row's ids
        known = None
        if self.known_ids is not None:
            known = [self.known_ids[row * had + i] for row in range(self.shape[0]) for i in at]
        with outside_transforms():
            where = torch.tensor(at, device=self.ids.device)
        ids = self.ids.view(self.shape).index_select(1, where)
        later = self._later = RowPlan(ids, self.members, known, self.ranks)
        return later

    def _of_flattened(self, x: Tensor) -> RowPlan:
        """The plan for x (N T, ...), or this one if that isn't its size."""
        rows, count = self.shape[0], x.shape[0] if x.ndim else 0
        tokens = count // rows if rows else 0
        known = self.rows if self.by_token else rows * tokens
        if not tokens or count == rows or count != known:
            return self
        if not self.known or is_tracing_here() or is_watched():
            return self.of_tokens(tokens)
        made = self._flat.get(tokens)
        if made is None:
            with outside_transforms():
                made = self.of_tokens(tokens)
            self._flat = {tokens: made}  # a batch has one size at a time
        return made

    def of_tokens(self, tokens: int) -> RowPlan:
        """The plan of a batch whose rows are the tokens of this one's, `tokens` of each row."""
        if not self.by_token:
            known = (
                None
                if self.known_ids is None
                else [i for i in self.known_ids for _ in range(tokens)]
            )
            return RowPlan(self.ids.repeat_interleave(tokens), self.members, known, self.ranks)
        made = RowPlan(self.ids, self.members, self.known_ids, self.ranks)
        made.groups = self.groups
        return made

    def flat(self, x: Tensor, path: str) -> Tensor:
        """A site's input with its rows first: x (N, ..., d_in), or (N T, ..., d_in) of tokens.

        Raises:
            StructureError: the leading dimensions aren't those of the batch.
            UnsupportedError: torch.jit.trace records the call.
        """
        if is_traced():
            raise untraceable(f"site {path!r}: ")
        features = x.is_floating_point()
        if not self.by_token:
            if x.ndim < 1 + features or x.shape[0] != self.rows:
                raise not_rows(path, x, self.rows)
            return x
        return batch_axes(x, self.shape, path, features).flatten(0, 1)

    def unflat(self, y: Tensor) -> Tensor:
        """A result for the tensor that `flat` gave, with the batch's own dimensions again."""
        return y.unflatten(0, self.shape) if self.by_token else y

    def at_site(self, layout: Layout, path: str, present: Tensor | None) -> RowPlan:
        """The plan for a site, where rows of members that lack it have the bare base.

        Args:
            layout: the stack's.
            path: the site.
            present: (members,) 1 where a member has the site; None where all have it.
        """
        if present is None:
            return self
        ids = self.ids.view(self.shape)
        if self.known_ids is None or torch.compiler.is_dynamo_compiling():
            # Values decide, so that one graph serves members of any sites.
            there = present.to(ids.device)[ids.clamp(min=0)] > 0.5
            ids = torch.where(there, ids, BARE)
            return RowPlan(ids, self.members, None, self.ranks, self.goes_on, self.flattened)
        lacking = layout.lacking(path)
        if lacking.isdisjoint(self.known_ids):
            return self
        known = [BARE if i in lacking else i for i in self.known_ids]

        def make() -> RowPlan:
            own = torch.tensor(known, dtype=torch.int64, device=ids.device).view(self.shape)
            return RowPlan(own, self.members, known, self.ranks, self.goes_on, self.flattened)

        return once(self._without, lacking, make, is_watched())

    def layout(
        self, x: Tensor, path: str, in_place: bool = False, banded: bool = False
    ) -> SegmentLayout:
        """The layout for a site's input.

        Args:
            x: (rows, ..., d_in), as `flat` gives it.
            path: the path of the site, for the message.
            in_place: whether segments are written onto the batch: then members with as many rows
                share one, unless rows are few.
            banded: whether a segment may be cut by bands of ranks, where members' ranks differ.
        """
        if self.known_ids is None or torch.compiler.is_dynamo_compiling():
            return traced(self.ids.to(x.device), self.members)
        watched = is_watched()
        if watched and is_tracing_here():
            return traced(self.ids.to(x.device), self.members)
        tokens = x[:1].numel() // (max(x.shape[-1], 1) if x.is_floating_point() else 1)
        half = tokens.bit_length() // 2  # one layout serves all sizes of similar magnitude
        ids, graph, device = self.known_ids, torch.is_grad_enabled(), x.device
        ranks = self.ranks if banded else None

        def make() -> SegmentLayout:
            return laid_out(ids, self.members, 1 << (2 * half), not graph, device, in_place, ranks)

        key = (half, graph, in_place, ranks is not None, device)
        return once(self._layouts, key, make, watched)


def once(made: dict[K, V], key: K, make: Callable[[], V], watched: bool) -> V:
    """made[key], made by `make` where it isn't there yet.

    It serves calls of every kind, since its tensors belong to no inference mode and no transform.
    Where a mode of torch sees each operation (`watched`), and may put in tensors of its own, they
    are made for this call alone.
    """
    found = None if watched else made.get(key)
    if found is None:
        with torch.inference_mode(False), outside_transforms():
            found = make()
        if not watched:
            made[key] = found
    return found
