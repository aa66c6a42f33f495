"""Adapters that act at some tokens of a batch alone, as values that `ll.apply` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter, leaves, rebuild
from ..core.adapter_shapes import check_shapes
from ..core.arguments import flag, items, whole
from ..core.errors import StructureError, UnsupportedError
from ..core.torch_internals import is_tracing_here, outside_transforms, plain_values
from ..kernels.row_plan import RowPlan
from .mixed import Mixed
from .rows import BARE, Rows

__all__ = ["activated", "invoked"]


def activated(params: Any, mask: Tensor, *, goes_on: bool = False) -> Any:
    """Adapters that act at some tokens alone: `ll.apply(model, ll.activated(params, mask), ids)`.

    Each adapted layer is the base's wherever the mask is zero. What comes back is `params` with
    each adapter as `ll.rows` of its one member, and with what is masked taken out of rows and
    weights. So it goes with whatever they go with, and refuses what they refuse. Methods that
    edit tokens of the prompt in whole modules take `ll.prompted`.

    Args:
        params: an Adapter, `ll.rows`, `ll.mixed`, or several of them, as `ll.apply` takes them.
        mask: (N, T), nonzero where an adapter acts.
        goes_on: whether tokens may come after those of the mask, as in `generate`: they are as the
            last one of their row. A call with fewer tokens is then one that goes on from a cache.

    Raises:
        StructureError: the mask isn't a tensor (N, T), or not of the rows of `params`.
        UnsupportedError: a method that edits tokens of the prompt, or `goes_on` with weights.
    """
    flag(goes_on, "activated: goes_on")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise StructureError(f"activated: expected a mask (N, T), found {found}")
    if isinstance(params, Adapter):
        return _of_one(params, mask, goes_on)
    if isinstance(params, Rows):
        plan = params.plan
        return Rows(params.stack, _masked(plan, mask, plan.members, goes_on))
    if isinstance(params, Mixed):
        return _weighed(params, mask, goes_on)
    if isinstance(params, Mapping):
        return {name: activated(part, mask, goes_on=goes_on) for name, part in params.items()}
    if isinstance(params, (tuple, list)):
        return tuple(activated(part, mask, goes_on=goes_on) for part in params)
    raise StructureError(f"activated: expected adapters, found {type(params).__name__}")


def _of_one(params: Adapter, mask: Tensor, goes_on: bool) -> Rows:
    """One adapter as a stack of itself, whose leaves share its memory."""
    check_shapes(params)
    variant = params.layout.variant
    if variant.reads_prompt:
        raise UnsupportedError(
            f"activated: {variant.name} edits tokens of the prompt in whole modules; give it those "
            f"with ll.prompted(params, mask)"
        )
    stack = rebuild(params.layout, [t.unsqueeze(0) for t in leaves(params)])
    return Rows(stack, _masked(None, mask, 1, goes_on))


def _masked(plan: RowPlan | None, mask: Tensor, members: int, goes_on: bool) -> RowPlan:
    """A plan for tokens, without those that are masked; of member 0 where there is no plan."""
    ranks = None if plan is None else plan.ranks
    if plan is not None:
        _check(mask, plan.shape)
    plain = None if is_tracing_here() else plain_values(mask)
    if plain is None or (plan is not None and not plan.known):
        return RowPlan(_ids(plan, mask), members, None, ranks, goes_on)
    with outside_transforms():
        ids = _ids(plan, plain)
        return RowPlan(ids, members, ids.flatten().tolist(), ranks, goes_on)


def _ids(plan: RowPlan | None, mask: Tensor) -> Tensor:
    """(N, T): each token's member, or none where the mask is zero."""
    if plan is None:
        return (mask != 0).long() - 1
    ids = plan.ids.view(plan.shape)
    return torch.where(mask.to(ids.device) != 0, ids if plan.by_token else ids[:, None], BARE)


def _weighed(params: Mixed, mask: Tensor, goes_on: bool) -> Mixed:
    """Weights for tokens, zero for those that are masked."""
    if goes_on:
        raise UnsupportedError(
            "activated: weights of tokens that come later aren't known; call the model with those "
            "of each step, without goes_on"
        )
    if isinstance(params.weights, Mapping):
        return Mixed(params.stack, {p: _kept(w, mask) for p, w in params.weights.items()})
    return Mixed(params.stack, _kept(params.weights, mask))


def _kept(w: Tensor, mask: Tensor) -> Tensor:
    """Weights (N, T, K), zero for masked tokens."""
    _check(mask, tuple(w.shape[:-1]))
    own = w if w.ndim > 2 else w[:, None]
    return torch.where((mask != 0)[..., None].to(w.device), own, 0.0)


def _check(mask: Tensor, shape: Sequence[int]) -> None:
    if tuple(mask.shape[: len(shape)]) != tuple(shape):
        raise StructureError(
            f"activated: expected a mask of {' x '.join(map(str, shape))} "
            f"{'tokens' if len(shape) > 1 else 'rows'}, found shape {tuple(mask.shape)}"
        )


def invoked(input_ids: Tensor, invocation_tokens: Sequence[int]) -> Tensor:
    """Which tokens come with or after the last occurrence of an invocation sequence: the mask of an
    activated LoRA, `ll.activated(params, ll.invoked(input_ids, tokens), goes_on=True)`.

    Of a row without that sequence no token does. Greenewald et al. 2025, arXiv 2504.12397.

    Args:
        input_ids: (N, T) token ids.
        invocation_tokens: the sequence, at least one id.

    Returns:
        (N, T) bool.

    Raises:
        StructureError: ids that aren't (N, T), or no sequence of ids.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        found = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else input_ids
        raise StructureError(f"invoked: expected input_ids (N, T), found {found}")
    if isinstance(invocation_tokens, Tensor) and invocation_tokens.ndim == 1:
        invocation_tokens = invocation_tokens.tolist()
    ids = items(invocation_tokens, "invoked: invocation_tokens", "ids")
    ids = [whole(i, f"invoked: invocation_tokens[{n}]", least=0) for n, i in enumerate(ids)]
    length, tokens = len(ids), input_ids.shape[1]
    if not length:
        raise StructureError("invoked: expected at least one invocation token, found none")
    if length > tokens:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    wanted = torch.as_tensor(ids, device=input_ids.device)
    begins = (input_ids.unfold(1, length, 1) == wanted).all(-1)  # (N, T - length + 1)
    at = torch.arange(begins.shape[1], device=input_ids.device)
    last = torch.where(begins, at, -1).amax(1, keepdim=True)  # (N, 1), -1 where there is none
    place = torch.arange(tokens, device=input_ids.device)
    return (place >= last) & (last >= 0)
