"""A batch whose rows, or tokens, have different adapters of a stack, as a value of `ll.apply`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core.adapter import Adapter, count_members
from ..core.arguments import texts
from ..core.config_values import check_pattern
from ..core.errors import StructureError, nearest
from ..core.nodes import register_node
from ..core.stacked import Stacked
from ..core.torch_internals import first_of, is_tracing_here, outside_transforms, plain_values
from ..kernels.row_plan import BARE, RowPlan
from .bank import Bank

__all__ = ["BARE", "Id", "Rows", "rows"]


class Rows:
    """A stack of adapters and which of them each row of a batch has, or each token. A pytree node
    around the stack.

    Attributes:
        stack: the adapters, every leaf (K, ...).
        plan: the rows (or tokens), sorted once.
    """

    __slots__ = ("plan", "stack")

    def __init__(self, stack: Adapter, plan: RowPlan) -> None:
        self.stack, self.plan = stack, plan

    @property
    def ids(self) -> Tensor:
        """(N,) int64: the member of each row, -1 for the bare base; (N, T) of each token."""
        return self.plan.ids.view(self.plan.shape)

    def __repr__(self) -> str:
        what = "tokens" if self.plan.by_token else "rows"
        return f"Rows({self.plan.rows} {what} of {self.plan.members} adapters)\n{self.stack!r}"


Id: TypeAlias = "int | str | None"


def rows(
    stack: Adapter | Bank,
    ids: Tensor | Sequence[Id | Sequence[Id]],
    *,
    flattened: str | Sequence[str] = (),
) -> Rows:
    """Each row of a batch its own adapter: `ll.apply(model, ll.rows(stack, [0, 2, -1, 0]), x)`; or
    each token: ids (N, T), packed ones (1, T).

    Row i of the model's output is what `ll.apply(model, stack[ids[i]], x)` has there. The base runs
    once on the whole batch (a layer whose weight itself is adapted, once for each adapter, on its
    rows). Rows are the first dimension of every site's input, or where torch's attention and
    recurrent layers have them; ids in ascending order cost nothing, others an index of the
    activations per site. Keep the value for as long as the mix is the same: the rows are sorted
    when they are first seen.

    With ids (N, T) each adapted layer changes token t of row n by adapter ids[n, t]. Every site's
    input is (N, T, features) then. What isn't, and a module in which tokens may meet (a whole
    block, a convolution, attention whose own weights are adapted), is refused with its path.

    Args:
        stack: what `ll.stack` gave, or an `ll.Bank` as it is now.
        ids: per row the index of its adapter, -1 (or None) for the bare base; or names, where the
            stack has names. A tensor (N,) of ints or a sequence; per token a tensor (N, T), or a
            sequence of sequences. Under torch.compile a tensor that is an input of the graph: one
            graph serves every mix.
        flattened: regular expressions for the paths of layers whose input has all tokens of the
            batch in one dimension, (N T, features), row by row as `x.view(-1, features)` leaves
            them: routers and shared experts of many mixtures of experts. The shape doesn't tell
            that order, so it is taken from here; others are refused.

    Raises:
        StructureError: not a stack, an id that it doesn't have, ids that aren't one number or name
            per row, or per token, or a pattern that matches no site.
    """
    if isinstance(stack, Bank):
        stack = stack.snapshot()
    count, patterns = count_members(stack, "rows"), _patterns(stack, flattened)
    if isinstance(ids, Tensor):
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if ids.ndim not in (1, 2) or not whole:
            raise StructureError(
                f"rows: expected integer ids (N,) or (N, T), found {ids.dtype} of shape "
                f"{tuple(ids.shape)}"
            )
        plain = None if is_tracing_here() else plain_values(ids)
        if plain is None:
            return Rows(stack, RowPlan(ids.long(), count, None, flattened=patterns))
        with outside_transforms():
            held = plain.long()
            known = held.flatten().tolist()
    else:
        known, shape = _numbers(stack, ids)
        held = torch.tensor(known, dtype=torch.int64).view(shape)
    odd = first_of((n for n, i in enumerate(known) if not BARE <= i < count), None)
    if odd is not None:
        tokens = held.shape[-1] if held.ndim > 1 else 0
        where = f"row {odd // tokens}, token {odd % tokens}" if tokens else f"row {odd}"
        raise StructureError(
            f"rows: {where} has id {known[odd]}, expected -1 (the bare base) to {count - 1}: the "
            f"stack has {count} members"
        )
    ranks = stack.layout.ranks if isinstance(stack.layout, Stacked) else None
    return Rows(stack, RowPlan(held, count, known, ranks, flattened=patterns))


def _patterns(stack: Adapter, flattened: str | Sequence[str]) -> tuple[str, ...]:
    """The patterns of flattened sites, each of which matches one."""
    patterns = texts(flattened, "rows: flattened")
    for pattern in patterns:
        check_pattern(pattern, "rows: flattened")
        if not any(re.search(pattern, path) for path in stack):
            raise StructureError(
                f"rows: flattened: {pattern!r} matches no site; {nearest(pattern, stack)}"
            )
    return patterns


def _numbers(stack: Adapter, ids: Any) -> tuple[list[int], tuple[int, ...]]:
    """(the ids as numbers, in one list; their shape), of a sequence or a sequence of sequences."""
    if isinstance(ids, (str, Mapping, Set)) or not isinstance(ids, Iterable):
        raise StructureError(f"rows: expected a sequence of ids, found {type(ids).__name__}")
    ids = list(ids)
    by_token = [_is_nested(i) for i in ids]
    if not any(by_token):
        return [_index(stack, i) for i in ids], (len(ids),)
    ids = [list(i) if nested else i for i, nested in zip(ids, by_token, strict=True)]
    lengths = {len(i) if nested else None for i, nested in zip(ids, by_token, strict=True)}
    if len(lengths) != 1:
        raise StructureError(
            "rows: expected as many ids for each row, one for each of its tokens, found "
            f"{', '.join(sorted(map(str, lengths)))}; pad them with -1"
        )
    return [_index(stack, i) for own in ids for i in own], (len(ids), lengths.pop() or 0)


def _is_nested(i: Any) -> bool:
    """Whether an entry of ids is itself a sequence of them; a tensor () is a number."""
    nested = isinstance(i, Iterable) and not isinstance(i, (str, Mapping, Set))
    return nested and getattr(i, "ndim", 1) > 0


def _index(stack: Adapter, i: Any) -> int:
    """A row's id as a number."""
    if i is None:
        return BARE
    if isinstance(i, str):
        labels = stack.layout.labels if isinstance(stack.layout, Stacked) else None
        if labels is None:
            raise StructureError(
                f"rows: {i!r} is a name, but the stack has none; ll.stack({{name: adapter, "
                f"...}}) gives it names"
            )
        if i not in labels:
            known = [label for label in labels if label is not None]
            raise StructureError(f"rows: no member {i!r}; {nearest(i, known)}")
        return labels.index(i)
    if isinstance(i, bool) or not hasattr(i, "__index__"):
        raise StructureError(f"rows: expected ints, names or None, found {type(i).__name__}")
    return int(i.__index__())


def _flatten(value: Rows) -> tuple[list[Any], RowPlan]:
    return [value.stack], value.plan


def _unflatten(children: Iterable[Any], plan: RowPlan) -> Rows:
    return Rows(next(iter(children)), plan)


register_node(Rows, _flatten, _unflatten)
