"""AdamW as pure functions on a stack: one update for K adapters, each with its own learning rate, weight decay and clipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..core.adapter import ABSENT, Adapter, keys, leaves, members_of
from ..core.config import probability, real
from ..core.errors import ConfigError, StructureError, short_repr
from .tree import check_adapter

__all__ = ["AdamW", "AdamWState", "adamw", "clip_grads"]


class AdamWState(NamedTuple):
    """The number of updates (); running means of the gradients and of their squares, shaped like
    the adapter.
    """

    step: Tensor
    mean: Adapter
    square: Adapter


class AdamW(NamedTuple):
    """`init(trainable) -> state`, `update(grads, state, trainable, lr=None) -> (trainable, state)`:
    both pure.
    """

    init: Callable[[Adapter], AdamWState]
    update: Callable[..., tuple[Adapter, AdamWState]]


def adamw(
    lr: float | Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor = 0.0,
) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), the numbers of torch.optim.AdamW, for
    an adapter or a stack of K.

    One update moves all members, and what each does is what it would do alone: K runs in one.
        `update(..., lr=...)` takes another
    learning rate for that update (a schedule).

    Args:
        lr: learning rate, or one per member (K,).
        betas: decay of the running means.
        eps: added to the root.
        weight_decay: decoupled, times lr; or one per member (K,). 0 by default: gates and
            magnitudes live near 1.

    Raises:
        ConfigError: a setting of the wrong type, or out of range.
        StructureError: in `init` and `update`, a vector that isn't one per member of a stack;
            gradients or a state of another adapter.
    """
    for value, what in ((lr, "lr"), (weight_decay, "weight_decay"), (eps, "eps")):
        _not_negative(value, f"adamw: {what}")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ConfigError(f"adamw: betas: expected two numbers, found {short_repr(betas)}")
    for beta in betas:
        real(beta, "adamw: betas")
        probability(beta, "adamw: betas")
    slow, slower = betas

    def init(trainable: Adapter) -> AdamWState:
        check_adapter(trainable, "adamw")
        for value, what in ((lr, "lr"), (weight_decay, "weight_decay")):
            _per_member(value, trainable, f"adamw: {what}")
        first = next((t for t in leaves(trainable) if isinstance(t, Tensor)), None)
        step = torch.zeros((), device=None if first is None else first.device)
        return AdamWState(
            step,
            pytree.tree_map(torch.zeros_like, trainable),
            pytree.tree_map(torch.zeros_like, trainable),
        )

    @torch.no_grad()
    def update(
        grads: Adapter, state: AdamWState, trainable: Adapter, lr: float | Tensor | None = lr
    ) -> tuple[Adapter, AdamWState]:
        if not isinstance(state, AdamWState):
            raise StructureError(
                f"adamw: expected update(grads, state, trainable), found {type(state).__name__} "
                f"for the state"
            )
        for tree, what in ((grads, "gradients"), (state.mean, "state")):
            _same_leaves(tree, trainable, what)
        _not_negative(lr, "adamw: lr")
        rate = _per_member(lr, trainable, "adamw: lr")
        step = state.step + 1
        soft = 1.0 - slow ** step.double()
        root = (1.0 - slower ** step.double()).sqrt()

        def moved(p: Tensor, m: Tensor, v: Tensor) -> Tensor:
            own = rate if not isinstance(rate, Tensor) else _along(rate, p)
            decay = (
                weight_decay if not isinstance(weight_decay, Tensor) else _along(weight_decay, p)
            )
            size = (own / soft).to(p.dtype) if isinstance(own, Tensor) else (own / soft).to(p)
            denominator = v.sqrt().div_(root.to(p)).add_(eps)
            return (p * (1.0 - own * decay)).to(p.dtype).sub_(m.div(denominator).mul_(size))

        mean = pytree.tree_map(lambda m, g: torch.lerp(m, g, 1.0 - slow), state.mean, grads)
        square = pytree.tree_map(
            lambda v, g: (v * slower).addcmul_(g, g, value=1.0 - slower), state.square, grads
        )
        return pytree.tree_map(moved, trainable, mean, square), AdamWState(step, mean, square)

    return AdamW(init, update)


def clip_grads(grads: Adapter, max_norm: float | Tensor) -> tuple[Adapter, Tensor]:
    """(gradients, norms): each member's shortened to a length of at most `max_norm` over all its
    leaves, on its own.

    Args:
        grads: of one adapter, or of a stack of K; absent leaves stay so.
        max_norm: the bound, or one per member (K,).

    Returns:
        The clipped gradients and the lengths before, () or (K,).

    Raises:
        ConfigError: a bound that is negative, or no number.
        StructureError: not an Adapter, or a vector that isn't one per member of a stack.
    """
    check_adapter(grads, "clip_grads")
    _not_negative(max_norm, "clip_grads: max_norm")
    _per_member(max_norm, grads, "clip_grads: max_norm")
    stacked = _is_stack(grads)
    present = [t for t in leaves(grads) if t is not ABSENT]
    if not present:
        return grads, torch.zeros(())
    start = 1 if stacked else 0
    norms = torch.stack(
        [
            torch.linalg.vector_norm(t.flatten(start), dim=-1)
            for t in (t if t.ndim > start else t[..., None] for t in present)
        ]
    )
    norm = torch.linalg.vector_norm(norms, dim=0)  # () or (K,)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return pytree.tree_map(lambda t: t * _along(factor, t).to(t.dtype), grads), norm


def _not_negative(value: Any, what: str) -> None:
    real(value, what)
    if (
        isinstance(value, (int, float)) and not value >= 0
    ):  # a tensor's values may be data of a graph
        raise ConfigError(f"{what}: expected a number of at least 0, found {short_repr(value)}")


def _same_leaves(tree: Any, trainable: Any, what: str) -> None:
    """Refuse a tree that isn't leaf by leaf beside the adapter's."""
    check_adapter(trainable, "adamw")
    check_adapter(tree, f"adamw: {what}")
    found, expected = (
        {key for key, t in zip(keys(a), leaves(a), strict=True) if t is not ABSENT}
        for a in (tree, trainable)
    )
    if found != expected:
        path, name = min(found ^ expected)
        raise StructureError(
            f"adamw: {what}: {path!r} {name} is in "
            f"{'these' if (path, name) in found else 'the adapter'} alone"
        )


def _is_stack(params: Adapter) -> bool:
    """Whether leaves have one axis more than the layout says."""
    for path, specs in params.layout.specs.items():
        for name, leaf in params._data[path].items():
            if isinstance(leaf, Tensor):
                return leaf.ndim > len(specs[name].shape)
    return False


def _along(value: Tensor, leaf: Tensor) -> Tensor:
    """() or (K,) against a leaf (K, ...)."""
    return value.to(leaf.device).view(*value.shape, *[1] * (leaf.ndim - value.ndim))


def _per_member(value: Any, trainable: Adapter, what: str) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        count = members_of(trainable, what)
        if tuple(value.shape) != (count,):
            raise StructureError(
                f"{what}: expected one number or {count}, one per member of the stack, found "
                f"shape {tuple(value.shape)}"
            )
    return value
