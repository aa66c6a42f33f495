"""A call that also gives what routers decided in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..algebra.flatten import Adapters
from ..core.errors import UnsupportedError
from ..injection.attachment import Attachment
from ..injection.base_tensors import Constants
from ..injection.bound import Entry, entries_of
from ..injection.prompt import Prompted
from ..injection.side_outputs import SideOutputs
from ..injection.tree_copy import copy_tree
from ..layers.tied import holder_of
from .apply import attachments_of, with_prompt

__all__ = ["collect"]


def collect(
    model: nn.Module, params: Adapters | Prompted, /, *args: Any, **kwargs: Any
) -> tuple[Any, dict[str, Tensor]]:
    """`ll.apply`, and the probabilities by which routed methods shared tokens out:
    `y, router = ll.collect(model, params, x)`, for a loss that keeps experts in use
    (`ll.load_balance(router)`).

    Pure as `apply`, and works wherever it does: gradients reach the router through both results.
    The probabilities are those of all experts, before `top_k` chooses. `ll.collect(bound, (), x)`
    is a bound model's own call, whose gradients reach its parameters as they do there.

    Args:
        model: the frozen base, or a bound model; never written.
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
    bound, seen = entries_of(model), SideOutputs()
    routed = {path: _seen_by(seen, attachments) for path, attachments in sites.items()}
    variants = [a.variant for attachments in sites.values() for a in attachments]
    variants += [entry.layout.variant for entry in bound or ()]
    if all(variant.router is None for variant in variants):
        names = sorted({variant.name for variant in variants})
        raise UnsupportedError(
            f"collect: no method here has a router, found {', '.join(names) or 'no adapter'}; "
            f"call ll.apply"
        )
    tree = copy_tree(model, routed, Constants({}, detach=bound is None))
    _observe(tree, bound or (), seen)
    output = tree(*args, **kwargs)
    return output, seen.taken()


def _seen_by(seen: SideOutputs, attachments: Iterable[Attachment]) -> list[Attachment]:
    """The adapters of a site, of which the routed ones tell what they decide."""
    return [a.changed(seen=seen) if a.variant.router is not None else a for a in attachments]


def _observe(tree: nn.Module, bound: Iterable[Entry], seen: SideOutputs) -> None:
    """Let the routed adapters that a bound model's copy holds tell what they decide."""
    for entry in bound:
        if entry.layout.variant.router is not None:
            for path in entry.slots:
                state = tree.get_submodule(holder_of(entry.layout.sites[path])).__dict__["_ll"]
                state.attachments = tuple(_seen_by(seen, state.attachments))
