"""A call that also gives what routers decided in it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..algebra.flatten import Adapters
from ..core.errors import UnsupportedError
from ..injection.base_tensors import Constants
from ..injection.prompt import Prompted
from ..injection.side_outputs import SideOutputs
from ..injection.tree_copy import copy_tree
from .apply import attachments_of, with_prompt

__all__ = ["collect"]


def collect(
    model: nn.Module, params: Adapters | Prompted, /, *args: Any, **kwargs: Any
) -> tuple[Any, dict[str, Tensor]]:
    """`ll.apply`, and the probabilities by which routed methods shared tokens out:
    `y, router = ll.collect(model, params, x)`, for a loss that keeps experts in use
    (`ll.load_balance(router)`).

    Pure as `apply`, and works wherever it does: gradients reach the router through both results.
    The probabilities are those of all experts, before `top_k` chooses.

    Args:
        model: the frozen base; never written.
        params: as in `apply`; of `ll.rows` each row's are those of its own adapter, and zero where
            it has none.
        *args: the model's own positional arguments.
        **kwargs: the model's own keyword arguments.

    Returns:
        (what the model gives, {path: (..., E)}), for each routed site that was called.

    Raises:
        StructureError: as `apply`.
        UnsupportedError: no method among these has a router; or a site of one is called twice, has
            two of them, has weighted sums of them, or is called without a graph while one is
            recorded around it.
    """
    sites = attachments_of(*with_prompt(params), model)
    seen = SideOutputs()
    routed = {
        path: [a.changed(seen=seen) if a.variant.router is not None else a for a in attachments]
        for path, attachments in sites.items()
    }
    if not any(a.seen is not None for attachments in routed.values() for a in attachments):
        names = sorted({a.variant.name for attachments in sites.values() for a in attachments})
        raise UnsupportedError(
            f"collect: no method here has a router, found {', '.join(names) or 'no adapter'}; "
            f"call ll.apply"
        )
    output = copy_tree(model, routed, Constants({}))(*args, **kwargs)
    return output, seen.taken()
