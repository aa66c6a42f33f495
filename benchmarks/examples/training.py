"""One training loop for every task.

The adapter is a value; its leaves and the head's go to AdamW, and the base is never touched.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import optree
import torch
from torch import Tensor, nn
from tqdm import tqdm

import lora_lite_func as ll

from ..measure.harness import saved

__all__ = ["Batch", "Evaluation", "Run", "Task", "measure", "saved_mib", "stepper", "train"]

Batch = dict[str, Tensor]
Params = Any  # an ll.Adapter, or () for the bare base
Grad = Literal["autograd", "func"]

WARMUP = 0.1  # part of the steps over which the learning rate rises
CLIP = 1.0  # largest norm of the gradient
PAIRS = 20  # steps timed per method


@dataclass(frozen=True)
class Evaluation:
    """What held-out data gave: the score, a number per example, and for a language model the
    generated texts.
    """

    score: float
    outputs: Tensor
    texts: list[str] = field(default_factory=list)


class Task(Protocol):
    """A model and data. `params` is an adapter, or () for the bare base; `head` {name: tensor}, {}
    where there is none.

    Attributes:
        model: the base, as it was loaded.
        title: what is learned, for the plot.
        metric: the score's name.
        baseline: the name of the row without an adapter.
        reference: what a step without an adapter does, for the table's caption.
        source: folder of the files that the base came from.
    """

    model: Any
    title: str
    metric: str
    baseline: str
    reference: str
    source: Any

    def head(self) -> dict[str, Tensor]:
        """A new trainable head."""

    def batches(self, epoch: int) -> list[Batch]:
        """The training data in the epoch's order."""

    def calibration(self) -> dict[str, Any]:
        """The keywords of `ll.init` for methods that start from data: a few training batches, and a
        loss for those that need gradients.
        """

    def pairs(self) -> dict[str, Any]:
        """The keywords of `ll.init` for methods that start from contrastive pairs; {} where the
        data has none.
        """

    def loss(self, params: Params, head: dict[str, Tensor], batch: Batch) -> Tensor:
        """The mean loss of a batch."""

    def evaluate(self, params: Params, head: dict[str, Tensor]) -> Evaluation:
        """Score and outputs on the held-out data."""

    def fresh(self) -> Task:
        """The same task around a model loaded from the files again."""


@dataclass
class Run:
    """One row of the table: a method, what it learned, what it cost."""

    method: str
    lr: float
    params: Params
    head: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    final: Evaluation | None = None
    seconds: float = 0.0
    step_ms: float = math.nan
    step_ratio: float = math.nan
    saved_mib: float = math.nan

    @property
    def trainable(self) -> int:
        """How many numbers are learned, head included."""
        return (ll.num_params(self.params) if self.params else 0) + sum(
            t.numel() for t in self.head.values()
        )


# ----------------------------------------------------------------------------------------- training
def stepper(
    task: Task, run: Run, *, head_lr: float, steps: int, grad: Grad = "autograd"
) -> Callable[[Batch], Tensor]:
    """A function that takes a batch, moves the leaves of `run.params` and `run.head` one AdamW
    step, and returns the loss.

    Args:
        task: gives the loss.
        run: its adapter's trainable leaves and its head are updated in place.
        head_lr: learning rate of the head.
        steps: length of the cosine schedule.
        grad: "autograd" calls backward, "func" torch.func.grad_and_value; the numbers are the same.
    """
    trainable, frozen = _parts(run.params)
    leaves, head_leaves = _leaves(trainable), list(run.head.values())
    if not leaves and not head_leaves:
        return lambda batch: _forward(task, run, batch)

    def loss_of(live: tuple[Params, dict[str, Tensor]], batch: Batch) -> Tensor:
        adapter, head = live
        return task.loss(ll.combine(adapter, frozen) if run.params else (), head, batch)

    groups = [{"params": leaves, "lr": run.lr}, {"params": head_leaves, "lr": head_lr}]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], weight_decay=0.0
    )  # gates live near 1: decay would pull them to 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    live = (trainable, run.head)

    def step(batch: Batch) -> Tensor:
        if grad == "func":
            gradients, loss = torch.func.grad_and_value(loss_of)(live, batch)
            for leaf, g in zip(_leaves(live), _leaves(gradients), strict=True):
                leaf.grad = g
        else:
            for leaf in (*leaves, *head_leaves):
                leaf.requires_grad_()
            optimizer.zero_grad()
            loss = loss_of(live, batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_([*leaves, *head_leaves], CLIP)
        optimizer.step()
        schedule.step()
        return loss.detach()

    return step


def _parts(params: Params) -> tuple[Params, Params]:
    return ll.partition(params) if params else ((), ())


def _leaves(tree: Any) -> list[Tensor]:
    found: list[Tensor] = optree.tree_leaves(tree)
    return found


def _forward(task: Task, run: Run, batch: Batch) -> Tensor:
    """What a step is where nothing is learned."""
    with torch.no_grad():
        return task.loss(run.params, run.head, batch)


def cosine(step: int, steps: int) -> float:
    """The learning rate's factor: a linear rise over the first WARMUP of the steps, then half a
    cosine down to 0.
    """
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))


def train(task: Task, run: Run, *, epochs: int, head_lr: float, grad: Grad = "autograd") -> Run:
    """Train the run's adapter and head; losses per step and scores per epoch are noted on it."""
    start = time.perf_counter()
    if run.params or run.head:
        per_epoch = len(task.batches(0))
        step = stepper(task, run, head_lr=head_lr, steps=epochs * per_epoch, grad=grad)
        with tqdm(
            total=epochs * per_epoch, desc=f"{run.method:10s}", unit="step", dynamic_ncols=True
        ) as bar:
            for epoch in range(epochs):
                for batch in task.batches(epoch):
                    run.losses.append(step(batch).item())
                    bar.update()
                    bar.set_postfix_str(
                        f"loss {run.losses[-1]:.3f}{_last(task, run)}", refresh=False
                    )
                run.final = task.evaluate(run.params, run.head)
                run.scores.append(run.final.score)
            bar.set_postfix_str(f"loss {run.losses[-1]:.3f}{_last(task, run)}")
    else:
        run.final = task.evaluate(run.params, run.head)
        run.scores = [run.final.score] * epochs
    run.seconds = time.perf_counter() - start
    return run


def _last(task: Task, run: Run) -> str:
    return f", {task.metric} {run.scores[-1]:.3f}" if run.scores else ""


# --------------------------------------------------------------------------------------------- cost
def measure(task: Task, run: Run, *, head_lr: float, grad: Grad = "autograd") -> None:
    """Note on the run what a step costs: time, time over a step without an adapter, activations
        saved for the backward pass.

    Both kinds of step are timed in turn on the same batches, on copies: the run's own leaves don't
        move.
    """
    batches = task.batches(0)
    batches = (batches * (PAIRS // len(batches) + 1))[:PAIRS]
    copied = Run(run.method, run.lr, _copy(run.params), _copy(run.head))
    bare = Run(task.baseline, run.lr, (), _copy(run.head))
    steps = [stepper(task, r, head_lr=head_lr, steps=10**6, grad=grad) for r in (copied, bare)]
    times: tuple[list[float], list[float]] = ([], [])
    for batch in (*batches[:2], *batches):
        for step, taken in zip(steps, times, strict=True):
            taken.append(_timed(step, batch))
    own, reference = (statistics.median(taken[2:]) for taken in times)
    run.step_ms = 1e3 * own
    run.step_ratio = own / reference if run.params else 1.0
    run.saved_mib = max(saved_mib(task, copied, batch) for batch in batches)


def _copy(tree: Params) -> Params:
    return optree.tree_map(lambda t: t.detach().clone(), tree) if tree else tree


def _timed(step: Callable[[Batch], Tensor], batch: Batch) -> float:
    start = time.perf_counter()
    step(batch).item()  # item waits for the device
    return time.perf_counter() - start


def saved_mib(task: Task, run: Run, batch: Batch) -> float:
    """MiB that the forward pass keeps for the backward pass: distinct storages other than the
    base's, the adapter's and the head's.
    """
    for leaf in _leaves((_parts(run.params)[0], run.head)):
        leaf.requires_grad_()
    return saved(lambda: task.loss(run.params, run.head, batch), _held(task.model, run)) / 2**20


def _held(model: nn.Module, run: Run) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    yield from _leaves((run.params, run.head))
