"""What the verbs take for `params`: one adapter, rows of a stack, or several of them in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from ..core.adapter import Adapter, count_members
from ..core.adapter_shapes import check_shapes
from ..core.errors import StructureError, UnsupportedError
from ..kernels.mixture import Mixture, MixtureBySite
from ..kernels.row_plan import RowPlan
from .mixed import Mixed
from .rows import Rows

__all__ = ["Adapters", "flatten"]

if TYPE_CHECKING:
    from optree import PyTree

    # a PyTree[Tensor] is what optree's functions say that they give back: an Adapter for an Adapter
    Adapters: TypeAlias = (
        Adapter | PyTree[Tensor] | Rows | Mixed | Sequence["Adapters"] | Mapping[str, "Adapters"]
    )
else:
    Adapters = Adapter | Rows | Mixed | Sequence["Adapters"] | Mapping[str, "Adapters"]
"""One Adapter (or `ll.rows(stack, ids)`, `ll.mixed(stack, weights)`), or a tuple, list or dict of
them, applied in order.
"""


def flatten(
    params: Adapters, everywhere: bool = True
) -> list[tuple[Adapter, RowPlan | Mixture | MixtureBySite | None]]:
    """The adapters in order, checked; with a plan a stack, of which each row has its own part.

    Args:
        params: the adapters.
        everywhere: whether they are to act on all tokens, which one for some tokens can't.

    Raises:
        StructureError: something that isn't an adapter, or a tensor of the wrong shape.
        UnsupportedError: an adapter that is for the tokens from an invocation sequence on, or rows
            of a method whose rows depend on each other.
    """
    if isinstance(params, Adapter):
        check_shapes(params)
        if everywhere:
            _check_all_tokens(params)
        return [(params, None)]
    if isinstance(params, Rows):
        if count_members(params.stack, "rows") != params.plan.members:
            raise StructureError(
                f"rows: made for {params.plan.members} members, found "
                f"{count_members(params.stack, 'rows')}"
            )
        if not params.plan.by_token:
            _check_all_tokens(params.stack)
        layout = params.stack.layout
        if layout.variant.check_rows is not None:
            layout.variant.check_rows(layout.config, params.plan.by_token)
        return [(params.stack, params.plan)]
    if isinstance(params, Mixed):
        mixture, members = params.mixture(), count_members(params.stack, "mixed")
        if members != mixture.members:
            raise StructureError(
                f"mixed: weights for {mixture.members} members, found a stack of {members}"
            )
        if not mixture.by_token:
            _check_all_tokens(params.stack)
        return [(params.stack, mixture)]
    if isinstance(params, (tuple, list, Mapping)):
        parts: Iterable[Any] = params.values() if isinstance(params, Mapping) else params
        return [adapter for part in parts for adapter in flatten(part, everywhere)]
    swapped = "; the model comes first, then its adapter" if isinstance(params, nn.Module) else ""
    raise StructureError(
        f"expected an Adapter, or a tuple, list or dict of them, found "
        f"{type(params).__name__}{swapped}"
    )


def _check_all_tokens(adapter: Adapter) -> None:
    """Refuse an adapter that is for some tokens alone.

    Raises:
        UnsupportedError: it is; the message says how it is taken.
    """
    tokens = getattr(adapter.config, "invocation_tokens", ())
    if tokens:
        raise UnsupportedError(
            f"the adapter is for the tokens from its invocation sequence {list(tokens)} on, not "
            f"for all: ll.apply(model, ll.activated(params, ll.invoked(input_ids, "
            f"params.config.invocation_tokens)), input_ids)"
        )
