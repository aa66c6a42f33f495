"""AdamW as pure functions: one update for K adapters, each with its own learning rate and decay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..core.absent import ABSENT
from ..core.adapter import Adapter, keys, leaves
from ..core.config import probability, real
from ..core.errors import ConfigError, StructureError, short_repr
from ..core.torch_internals import first_of, fused_adamw, is_recorded
from .alike import every_adapter, map_adapters
from .rates import (
    Rate,
    Rates,
    along_members,
    check_fit,
    check_not_negative,
    check_rates,
    is_scalar,
    leaf_names,
    rate_of,
)

__all__ = ["AdamW", "AdamWState", "adamw"]


class AdamWState(NamedTuple):
    """The number of updates (); running means of the gradients and of their squares, shaped like
    the adapter.
    """

    step: Tensor
    mean: Any
    square: Any


class AdamW(NamedTuple):
    """`init(trainable) -> state` and `update(grads, state, trainable, lr=None, donate=False) ->
    (trainable, state)`, both pure.
    """

    init: Callable[[Any], AdamWState]
    update: Callable[..., tuple[Any, AdamWState]]


def adamw(
    lr: Rates,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Rates = 0.0,
) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), the numbers of torch.optim.AdamW, for
    an adapter, a stack of K, or a tuple, list or dict of them.

    One update moves all members, and what each does is what it would do alone: K runs in one.
    `update(..., lr=...)` takes another learning rate for that update (a schedule). Rates by leaf
    name give LoRA+ (Hayou, Ghosh and Yu 2024, arXiv 2402.12354): `ll.adamw({"lora_B": 16 * lr,
    "default": lr})`.

    An update can be differentiated in everything tensors are given for (gradients, state,
    parameters, rates), vmapped and compiled: inside a transform of torch.func, and where one of
    them requires a gradient. Elsewhere torch's fused kernel makes it, on copies; `update(...,
    donate=True)` lets it write on the memory of `state` and `trainable` instead, for a loop that
    uses neither of them afterwards (nor what shares their memory).

    Args:
        lr: learning rate; or one per member (K,); or {leaf name or "default": one of these}.
        betas: decay of the running means.
        eps: added to the root.
        weight_decay: decoupled, times lr; in the forms of lr. 0 by default: gates and magnitudes
            live near 1.

    Raises:
        ConfigError: a setting of the wrong type, or out of range.
        StructureError: in `init` and `update`, a vector that isn't one per member of a stack, a
            name that no leaf has, or a leaf without a rate; gradients or a state of another
            adapter.
    """
    for value, what in ((lr, "lr"), (weight_decay, "weight_decay")):
        check_rates(value, f"adamw: {what}")
    check_not_negative(eps, "adamw: eps")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ConfigError(f"adamw: betas: expected two numbers, found {short_repr(betas)}")
    for beta in betas:
        real(beta, "adamw: betas")
        probability(beta, "adamw: betas")
    slow, slower = betas

    def init(trainable: Any) -> AdamWState:
        for value, what in ((lr, "lr"), (weight_decay, "weight_decay")):
            check_fit(value, trainable, f"adamw: {what}")
        first = first_of((t for t in pytree.tree_leaves(trainable) if isinstance(t, Tensor)), None)
        step = torch.zeros((), device=None if first is None else first.device)
        mean, square = (pytree.tree_map(torch.zeros_like, trainable) for _ in range(2))
        return AdamWState(step, mean, square)

    def update(
        grads: Any, state: AdamWState, trainable: Any, lr: Rates = lr, donate: bool = False
    ) -> tuple[Any, AdamWState]:
        if not isinstance(state, AdamWState):
            raise StructureError(
                f"adamw: expected update(grads, state, trainable), found {type(state).__name__} "
                f"for the state"
            )
        for tree, what in ((grads, "gradients"), (state.mean, "state"), (state.square, "state")):
            _same_leaves(tree, trainable, what)
        check_rates(lr, "adamw: lr")
        check_fit(lr, trainable, "adamw: lr")
        flat, form = pytree.tree_flatten(trainable)
        columns = (flat, *map(pytree.tree_leaves, (grads, state.mean, state.square)))
        names = [name for a in every_adapter(trainable, "adamw") for name in leaf_names(a)]
        own = [(rate_of(lr, name), rate_of(weight_decay, name)) for name in names]
        plain = not is_recorded((*columns, own, state.step))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not plain):
            rule = _Rule(slow, slower, eps, state.step + 1, plain, donate)
            moved = [rule(*each) for each in zip(*columns, own, strict=True)]
        made = (pytree.tree_unflatten([m[i] for m in moved], form) for i in range(3))
        p, mean, square = made
        return p, AdamWState(rule.step, mean, square)

    return AdamW(init, update)


# The compiler of torch 2.8 hashes it before it has its values, so its hash must not read those.
@dataclass(frozen=True, eq=False)
class _Rule:
    """One update of one leaf: it takes (p, g, m, v, (rate, decay)) and gives (p', m', v')."""

    slow: float
    slower: float
    eps: float
    step: Tensor
    plain: bool
    donate: bool

    def __call__(
        self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, own: tuple[Rate, Rate]
    ) -> tuple[Tensor, Tensor, Tensor]:
        lr, decay = own
        if self.plain and not isinstance(decay, Tensor) and is_scalar(lr):
            made = (p, m, v) if self.donate else (p.clone(), m.clone(), v.clone())
            betas = (self.slow, self.slower)
            if fused_adamw(
                made[0],
                g,
                *made[1:],
                self.step.to(p.device),
                lr=lr,
                betas=betas,
                eps=self.eps,
                weight_decay=decay,
            ):
                return made
        return self._by_formula(p, g, m, v, lr, decay)

    def _by_formula(
        self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: Rate, decay: Rate
    ) -> tuple[Tensor, Tensor, Tensor]:
        """p (1 - lr decay) - lr m^ / (sqrt(v^) + eps), in new tensors."""
        lr, decay = (
            along_members(r.double(), p) if isinstance(r, Tensor) else r for r in (lr, decay)
        )
        step = self.step.double()
        m = torch.lerp(m, g, 1.0 - self.slow)
        v = v * self.slower + g * g * (1.0 - self.slower)
        size = lr / (1.0 - self.slow**step)
        root = (1.0 - self.slower**step).sqrt().to(p.dtype)
        denominator = (v.sqrt() if self.plain else _sqrt(v)) / root + self.eps
        kept = 1.0 - lr * decay
        if isinstance(kept, Tensor):
            kept = kept.to(p.dtype)
        moved = p * kept - (m / denominator).to(p.dtype) * size.to(p.dtype)
        return moved, m, v


def _sqrt(v: Tensor) -> Tensor:
    """sqrt(v) with derivative 0 at 0, so that a leaf without gradients gets no infinite one."""
    return torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)


def _same_leaves(tree: Any, trainable: Any, what: str) -> None:
    """Refuse a tree whose leaves don't match those of the adapters one by one."""

    def check(a: Adapter, b: Adapter) -> None:
        expected, found = (
            {key for key, t in zip(keys(x), leaves(x), strict=True) if t is not ABSENT}
            for x in (a, b)
        )
        if found != expected:
            path, name = min(found ^ expected)
            raise StructureError(
                f"adamw: {what}: {path!r} {name} is in "
                f"{'these' if (path, name) in found else 'the adapter'} alone"
            )
        # torch's fused kernel would write beyond the smaller one
        for (path, name), t, other in zip(keys(a), leaves(a), leaves(b), strict=True):
            if t is not ABSENT and t.shape != other.shape:
                raise StructureError(
                    f"adamw: {what}: {path!r} {name}: expected shape {tuple(t.shape)}, found "
                    f"{tuple(other.shape)}"
                )

    map_adapters(check, trainable, f"adamw: {what}", tree)
