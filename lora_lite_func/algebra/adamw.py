"""AdamW as pure functions: one update for K adapters, each with its own learning rate and decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..core.adapter import ABSENT, Adapter, keys, leaves, members_of
from ..core.config import probability, real
from ..core.errors import ConfigError, StructureError, nearest, short_repr
from ..core.torch_internals import fused_adamw, is_recorded
from .alike import every_adapter, map_adapters

__all__ = ["AdamW", "AdamWState", "adamw", "clip_grads"]

Rate = float | Tensor
"""A number, or one per member of a stack (K,)."""

Rates = Rate | Mapping[str, Rate]
"""A rate, or rates by the leaf's name ("default" for the others)."""

_DEFAULT = "default"


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
        _check_rates(value, f"adamw: {what}")
    _not_negative(eps, "adamw: eps")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ConfigError(f"adamw: betas: expected two numbers, found {short_repr(betas)}")
    for beta in betas:
        real(beta, "adamw: betas")
        probability(beta, "adamw: betas")
    slow, slower = betas

    def init(trainable: Any) -> AdamWState:
        for value, what in ((lr, "lr"), (weight_decay, "weight_decay")):
            _fit(value, trainable, f"adamw: {what}")
        first = next((t for t in pytree.tree_leaves(trainable) if isinstance(t, Tensor)), None)
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
        _check_rates(lr, "adamw: lr")
        _fit(lr, trainable, "adamw: lr")
        flat, form = pytree.tree_flatten(trainable)
        columns = (flat, *map(pytree.tree_leaves, (grads, state.mean, state.square)))
        names = [name for a in every_adapter(trainable, "adamw") for name in _names(a)]
        own = [(_of(lr, name), _of(weight_decay, name)) for name in names]
        plain = not is_recorded((*columns, own, state.step))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not plain):
            rule = _Rule(slow, slower, eps, state.step + 1, plain, donate)
            moved = [rule(*each) for each in zip(*columns, own, strict=True)]
        made = (pytree.tree_unflatten([m[i] for m in moved], form) for i in range(3))
        p, mean, square = made
        return p, AdamWState(rule.step, mean, square)

    return AdamW(init, update)


@dataclass(frozen=True)
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
        if self.plain and not isinstance(decay, Tensor) and _is_scalar(lr):
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
        lr, decay = (_along(r.double(), p) if isinstance(r, Tensor) else r for r in (lr, decay))
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


def _is_scalar(rate: Rate) -> bool:
    return not isinstance(rate, Tensor) or not rate.ndim


# ---------------------------------------------------------------------------------------- clipping
def clip_grads(grads: Any, max_norm: float | Tensor) -> tuple[Any, Tensor]:
    """(gradients, norms): each member's shortened to a length of at most `max_norm` over all its
    leaves, on its own.

    Args:
        grads: gradients of one adapter, of a stack of K, or of a tuple, list or dict of such, whose
            length is that of all together; absent leaves stay absent.
        max_norm: the bound, or one per member (K,).

    Returns:
        The clipped gradients and the lengths before, () or (K,).

    Raises:
        ConfigError: a bound that is negative, or isn't a number.
        StructureError: not an Adapter, a vector that isn't one per member of a stack, or stacks
            beside single adapters.
    """
    adapters = every_adapter(grads, "clip_grads")
    _not_negative(max_norm, "clip_grads: max_norm")
    _fit(max_norm, grads, "clip_grads: max_norm")
    counts = {members_of(a, "clip_grads") if _is_stack(a) else None for a in adapters}
    if len(counts) > 1:
        raise StructureError(
            "clip_grads: expected single adapters, or stacks of one size, found both or several"
        )
    start = 0 if counts == {None} else 1
    present = pytree.tree_leaves(grads)
    if not present:
        return grads, torch.zeros(())
    norms = torch.stack(
        [
            torch.linalg.vector_norm(t.flatten(start), dim=-1)
            for t in (t if t.ndim > start else t[..., None] for t in present)
        ]
    )
    norm = torch.linalg.vector_norm(norms, dim=0)  # () or (K,)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return pytree.tree_map(lambda t: t * _along(factor, t).to(t.dtype), grads), norm


# ------------------------------------------------------------------------------------------- rates
def _check_rates(value: Any, what: str) -> None:
    for rate in value.values() if isinstance(value, Mapping) else (value,):
        _not_negative(rate, what)


def _not_negative(value: Any, what: str) -> None:
    real(value, what)
    # a tensor's values may be data of a graph
    if isinstance(value, (int, float)) and not value >= 0:
        raise ConfigError(f"{what}: expected a number of at least 0, found {short_repr(value)}")


def _of(rates: Rates, name: str) -> Rate:
    if not isinstance(rates, Mapping):
        return rates
    return rates[name] if name in rates else rates[_DEFAULT]


def _fit(value: Any, tree: Any, what: str) -> None:
    """Refuse rates that don't fit the adapters: by names, and by members."""
    adapters = every_adapter(tree, what.partition(":")[0])
    if isinstance(value, Mapping):
        known = {name for a in adapters for name in _names(a)}
        odd = next((name for name in value if name not in known and name != _DEFAULT), None)
        if odd is not None:
            raise StructureError(f"{what}: no leaf is named {odd!r}; {nearest(str(odd), known)}")
        missing = sorted(known - value.keys())
        if missing and _DEFAULT not in value:
            raise StructureError(
                f"{what}: expected a rate for {missing[0]}, or one for {_DEFAULT!r}, found rates "
                f"for {', '.join(map(str, value)) or 'nothing'}"
            )
    for rate in value.values() if isinstance(value, Mapping) else (value,):
        if isinstance(rate, Tensor) and rate.ndim:
            for adapter in adapters:
                _per_member(rate, adapter, what)


def _per_member(rate: Tensor, adapter: Adapter, what: str) -> None:
    count = members_of(adapter, what)
    if tuple(rate.shape) != (count,):
        raise StructureError(
            f"{what}: expected one number or {count}, one per member of the stack, found "
            f"shape {tuple(rate.shape)}"
        )


# ------------------------------------------------------------------------------------------- leaves
def _names(adapter: Adapter) -> list[str]:
    """The name of each leaf that is there, in order."""
    return [
        name for (_, name), t in zip(keys(adapter), leaves(adapter), strict=True) if t is not ABSENT
    ]


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

    map_adapters(check, trainable, f"adamw: {what}", tree)


def _is_stack(params: Adapter) -> bool:
    """Whether leaves have one axis more than the layout says."""
    for path, specs in params.layout.specs.items():
        for name, leaf in params._data[path].items():
            if isinstance(leaf, Tensor):
                return leaf.ndim > len(specs[name].shape)
    return False


def _along(value: Tensor, leaf: Tensor) -> Tensor:
    """A tensor () or (K,) in a shape that broadcasts against a leaf (K, ...)."""
    return value.to(leaf.device).view(*value.shape, *[1] * (leaf.ndim - value.ndim))
