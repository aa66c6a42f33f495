"""A module's own call on a batch whose tokens have adapters of their own.

Tokens are rows for a layer that takes each of them alone, so they go the way of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..core.errors import UnsupportedError
from ..kernels.row_axes import batch_axes
from ..kernels.row_plan import RowPlan
from ..layers.token_wise import is_token_wise
from .attachment import Attachment
from .rows_weight import Chains, by_adapters

__all__ = ["by_tokens", "has_tokens"]


def has_tokens(chains: Chains) -> bool:
    """Whether some adapters are for tokens, rather than for rows."""
    return any(
        attachment.row_plan is not None and attachment.row_plan.by_token
        for attachments in chains.values()
        for attachment in attachments
    )


def by_tokens(
    module: Any,
    chains: Chains,
    holder: Callable[[Any], Any],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The module's output, each token of it computed with the token's own adapters.

    Args:
        module: the site.
        chains: its adapters, some of them with a plan for tokens.
        holder: as in `by_adapters`.
        call: as in `by_adapters`.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.

    Raises:
        StructureError: the input's first two dimensions aren't the batch's tokens.
        UnsupportedError: tokens may meet in the module.
    """
    path = module._ll.path
    flat, form = pytree.tree_flatten((args, kwargs))
    inputs = [t for t in flat if isinstance(t, Tensor)]
    if not is_token_wise(module) or len(inputs) != 1:
        raise UnsupportedError(
            f"{path!r} ({module._ll_base.__name__}): its weight itself is adapted, and tokens may "
            f"meet in its call, so they can't have adapters of their own; leave it out with "
            f"exclude_names, or give an id for each row"
        )
    plans = [a.row_plan for attachments in chains.values() for a in attachments]
    shapes = [p.fitting(inputs[0]).shape for p in plans if isinstance(p, RowPlan) and p.by_token]
    x, shape = inputs[0], shapes[0]
    for each in shapes:
        batch_axes(x, each, path, not isinstance(module, nn.Embedding))

    def of_tokens(attachment: Attachment) -> Attachment:
        plan = attachment.row_plan
        if not isinstance(plan, RowPlan):
            return attachment
        return attachment.changed(row_plan=plan.fitting(x).of_tokens(shape[1]))

    own = {key: tuple(map(of_tokens, attachments)) for key, attachments in chains.items()}
    given = [x.flatten(0, 1) if t is x else t for t in flat]
    args, kwargs = pytree.tree_unflatten(given, form)
    return by_adapters(module, own, holder, call, args, kwargs).unflatten(0, shape)
