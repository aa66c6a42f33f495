"""A model as a function of its adapter, whose copy of the model serves one call after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from ..algebra.flatten import Adapters, flatten
from ..algebra.mixed import Mixed
from ..algebra.rows import Rows
from ..core.adapter import Adapter
from ..core.errors import StructureError
from ..core.layout import Layout
from ..injection.attachment import Attachment
from ..injection.base_tensors import Constants
from ..injection.kept_tree import KeptTree, kept_tree
from ..injection.prompt import Prompted
from ..injection.tree_copy import copy_tree
from ..layers.refusals import check_model
from .apply import attachments_of, functional_call, with_prompt

__all__ = ["functional"]

Layouts: TypeAlias = Layout | Adapters | Prompted | Sequence["Layouts"] | Mapping[str, "Layouts"]
"""A Layout (`params.layout`), an adapter for its layout, or a tuple, list or dict of them."""


def functional(model: nn.Module, params: Layouts) -> Callable[..., Any]:
    """The model as a pure function of an adapter: `f = ll.functional(model, params)`.

    `f(params, *args, **kwargs)` is `ll.apply(model, params, *args, **kwargs)`, for any adapter of
    the same methods on the same sites: other values, ranks and strengths, stacks under vmap, rows
    of a stack. It works wherever `apply` does (transforms, `ll.grad`, checkpointing, threads,
    compiled) and costs less where the model has many modules: their copies are kept between calls.

    Each call sees the model as it is then: the values of its weights are shared, and where anything
    else has changed (a dtype, a mode, a hook, an attribute, a module) the model is copied anew.
    Copies are kept where nobody refers to a part of one after its call (gradient checkpointing does
    until the backward pass) and the call has left nothing on its modules. For models with hooks or
    with buffers in training mode, and for adapters on bare parameters or whole modules, each call
    makes its own, as `apply` does.

    Args:
        model: the frozen base; never written.
        params: an Adapter or its layout (`params.layout`); several in a tuple, list or dict are
            what each call gives, in that order. No tensor of them is kept.

    Raises:
        StructureError: a site isn't in the model or has another size; in a call, adapters of
            another method or on other sites, or a tensor of the wrong shape.
        UnsupportedError: the model can't be copied (TorchScript, compiled, sharded).
    """
    check_model(model)
    kept = _Function(model, _layouts(params))

    def f(params: Adapters | Prompted, /, *args: Any, **kwargs: Any) -> Any:
        return kept(params, args, kwargs)

    return f


_MOST = 4
"""How many copies are kept at most, which is how many calls at once each find one."""


class _Function:
    """What `functional` gives: the model, what it was made for, and copies that aren't in use."""

    def __init__(self, model: nn.Module, layouts: list[Layout]) -> None:
        self.model = model
        self.made_for = [_structure(layout) for layout in layouts]
        self.idle: dict[bool, list[KeptTree]] = {False: [], True: []}
        sites: dict[str, list[Attachment]] = {}
        for layout in layouts:
            for path, site in layout.sites.items():
                one = Attachment(layout.variant, layout.config, site, {}, layout.dropout)
                sites.setdefault(path, []).append(one)
        copy_tree(model, sites, Constants({}))  # says what doesn't fit

    def __call__(
        self, params: Adapters | Prompted, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._check(params)
        if torch.compiler.is_dynamo_compiling():  # a graph has nothing of the copies
            return functional_call(self.model, params, args, kwargs)
        sites = attachments_of(*with_prompt(params), self.model)
        idle = self.idle[torch.is_grad_enabled()]  # with a graph the base is made constant
        kept = _taken(idle, sites)
        if kept is None:
            root, kept = kept_tree(self.model, sites)
            if kept is None:
                return root(*args, **kwargs)
            del root
            kept.begin()
        result = kept.root(*args, **kwargs)
        if kept.is_done():
            kept.release()
            if len(idle) < _MOST:
                idle.append(kept)
        return result

    def _check(self, params: Any) -> None:
        """Refuse adapters of another method or on other sites."""
        found = [_structure(layout) for layout in _layouts(params)]
        if found == self.made_for:
            return
        expected, instead = (
            ", ".join(f"{name} on {len(paths)} sites" for name, paths in structures) or "none"
            for structures in (self.made_for, found)
        )
        odd = {path for _, paths in self.made_for for path in paths} ^ {
            path for _, paths in found for path in paths
        }
        where = f" ({min(odd)!r} is on one side alone)" if odd else ""
        raise StructureError(
            f"functional: expected adapters as it was made for ({expected}), found {instead}"
            f"{where}; make another by ll.functional(model, params)"
        )


def _taken(idle: list[KeptTree], sites: Mapping[str, list[Attachment]]) -> KeptTree | None:
    """A copy that has served before, for one call alone; None if there is none."""
    while True:
        try:
            kept = idle.pop()  # another thread gets another one
        except IndexError:
            return None
        if kept.serves(sites):
            return kept


def _structure(layout: Layout) -> tuple[str, tuple[str, ...]]:
    """(name of the method, paths of the sites)."""
    return layout.variant.name, tuple(layout.sites)


def _layouts(params: Any) -> list[Layout]:
    """The layouts in order.

    Raises:
        StructureError: something that is neither an adapter nor a layout.
    """
    if isinstance(params, Adapter):
        return [params.layout]
    if isinstance(params, Layout):
        return [params]
    if isinstance(params, (Rows, Mixed)):
        return [params.stack.layout]
    if isinstance(params, Prompted):
        return _layouts(params.params)
    if isinstance(params, (tuple, list, Mapping)):
        parts: Iterable[Any] = params.values() if isinstance(params, Mapping) else params
        return [layout for part in parts for layout in _layouts(part)]
    flatten(params)  # says what was found
    raise AssertionError("unreachable")
