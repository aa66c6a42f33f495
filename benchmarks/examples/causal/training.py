"""Training as a value: a state goes into a step, another comes out. One adapter, or a stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import lora_lite_func as ll

from ..training import Batch
from .encoding import IGNORED
from .feed import Feed
from .losses import row_losses

__all__ = ["SCHEDULES", "Recipe", "State", "Trainer", "random_states", "schedule_factor"]

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial")
"""Names of transformers.get_scheduler."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast.

    Attributes:
        steps: optimizer steps.
        lr: peak learning rate.
        schedule: one of SCHEDULES.
        warmup: part of the steps over which the rate rises.
        weight_decay: decoupled, times the rate.
        clip: largest norm of a gradient.
        accumulate: batches per step.
    """

    steps: int
    lr: float
    schedule: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1


class State(NamedTuple):
    """Everything that a step changes.

    Attributes:
        step: how many steps were made.
        trainable: the adapter's part that is learned.
        optimizer: what the optimizer keeps.
        random: torch's random states, of which dropout draws.
    """

    step: int
    trainable: ll.Adapter
    optimizer: ll.AdamWState
    random: list[Tensor]


def random_states() -> list[Tensor]:
    """Torch's random state on the CPU, and on the GPU where there is one."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


class Told(NamedTuple):
    """What a step says of itself, one number per member: mean loss, gradient's norm."""

    losses: list[float]
    norms: list[float]


def schedule_factor(recipe: Recipe) -> Callable[[int], float]:
    """step -> the learning rate's factor in it, as transformers has it for the step after: the
    first step isn't at zero, nor is the last.
    """
    from transformers import get_scheduler

    idle = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    made = get_scheduler(
        recipe.schedule,
        idle,
        num_warmup_steps=round(recipe.warmup * recipe.steps),
        num_training_steps=recipe.steps + 1,
    )
    factor: Callable[[int], float] = made.lr_lambdas[0]
    return lambda step: float(factor(step + 1))


class Trainer:
    """Steps of an adapter, or of a stack whose K members share every batch, each as it would be
    trained alone.

    Args:
        model: the base.
        params: the adapter or the stack at its start.
        feed: batches.
        recipe: how.
        rates: peak learning rates of a stack's members (K,).
    """

    def __init__(
        self,
        model: Any,
        params: ll.Adapter,
        feed: Feed,
        recipe: Recipe,
        rates: Tensor | None = None,
    ) -> None:
        self.model, self.feed, self.recipe = model, feed, recipe
        self.members = None if rates is None else ll.num_members(params)
        self.rates = recipe.lr if rates is None else rates
        self.factor = schedule_factor(recipe)
        self.optimizer = ll.adamw(self.rates, weight_decay=recipe.weight_decay)
        self.start, self.frozen = ll.partition(params)
        self.projects = params.layout.variant.project is not None
        self.step_of = ll.value_and_grad(self._loss, has_aux=True)

    def new(self) -> State:
        """The state before the first step."""
        return State(0, self.start, self.optimizer.init(self.start), random_states())

    def adapter(self, state: State) -> ll.Adapter:
        """The whole adapter or stack as it is."""
        return ll.combine(state.trainable, self.frozen)

    def __call__(self, state: State) -> tuple[State, Told]:
        """One step."""
        first = state.step * self.recipe.accumulate
        batches = [self.feed(first + i) for i in range(self.recipe.accumulate)]
        tokens = sum((b["labels"][:, 1:] != IGNORED).sum() for b in batches)
        losses, grads = self._gradients(state.trainable, batches, tokens)
        grads, norms = ll.clip_grads(grads, self.recipe.clip)
        moved, optimizer = self.optimizer.update(
            grads, state.optimizer, state.trainable, lr=self.rates * self.factor(state.step)
        )
        after = State(state.step + 1, self._projected(moved), optimizer, random_states())
        return after, Told(losses.flatten().tolist(), norms.flatten().tolist())

    def _gradients(
        self, trainable: ll.Adapter, batches: Sequence[Batch], tokens: Any
    ) -> tuple[Tensor, ll.Adapter]:
        """(losses (K,) or (), gradients) of the mean over the tokens of all batches."""
        (_, losses), grads = self.step_of(trainable, batches[0], tokens)
        for batch in batches[1:]:
            (_, more), others = self.step_of(trainable, batch, tokens)
            losses = losses + more
            grads = pytree.tree_map(torch.add, grads, others)
        return losses, grads

    def _loss(self, trainable: ll.Adapter, batch: Batch, tokens: Any) -> tuple[Tensor, Tensor]:
        """(the sum over members, each member's mean (K,) or ()) of this batch's part."""
        params: Any = ll.combine(trainable, self.frozen)
        if self.members is None:
            losses = row_losses(self.model, params, batch)[0].sum() / tokens
            return losses, losses.detach()
        rows = len(batch["labels"])
        ids = torch.arange(self.members, device=batch["labels"].device).repeat_interleave(rows)
        repeated = {name: t.repeat(self.members, 1) for name, t in batch.items()}
        sums = row_losses(self.model, ll.rows(params, ids), repeated)[0]
        losses = sums.unflatten(0, (self.members, rows)).sum(1) / tokens  # (K,)
        return losses.sum(), losses.detach()

    def _projected(self, trainable: ll.Adapter) -> ll.Adapter:
        """The nearest that the method's constraint allows, where it has one (COFT)."""
        if not self.projects:
            return trainable
        return ll.partition(ll.project(ll.combine(trainable, self.frozen)))[0]
