"""16 adapters at once: 4 learning rates x 2 ranks x 2 seeds of LoRA on the sentiment task.

    python -m benchmarks.examples.sweep [--quick] [--steps 80] [--plot sweep.png]

Trains the 16 as one stack, each on its own batches, as it would alone. Prints what that saves
against the same 16 one after another (ours, and PEFT's), the table of results, what an ensemble of
them gains and how its spread tells of its error (a plot). Then serves a batch whose rows each use
another of the 16. Under torchrun each process trains its share.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

import lora_lite_func as ll

from . import sentiment
from .sentiment import TARGETS, SentimentTask
from .training import Batch, cosine

__all__ = ["main"]

RATES, RANKS, SEEDS = (1e-3, 2e-3, 4e-3, 8e-3), (4, 16), (0, 1)
GRID = tuple(itertools.product(RATES, RANKS, SEEDS))
HEAD_RATE = 3e-3
WORDS = 4  # per adapter and step: the many small jobs that a sweep is made of

Heads = dict[str, Tensor]


def batches(task: SentimentTask, seed: int, steps: int) -> list[list[tuple[str, float]]]:
    """The words of one adapter's steps, in the order of its seed."""
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [task.train[i] for i in itertools.islice(itertools.cycle(order), steps * WORDS)]
    return [chosen[i : i + WORDS] for i in range(0, len(chosen), WORDS)]


def pooled(model: Any, params: Any, batch: Batch) -> Tensor:
    """Mean-pooled hidden states, (n, width)."""
    inputs = {k: t for k, t in batch.items() if k != "ratings"}
    hidden = (
        ll.apply(model, params, **inputs) if params is not None else model(**inputs)
    ).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def start(
    task: SentimentTask, grid: tuple[tuple[float, int, int], ...]
) -> tuple[ll.Adapter, Heads]:
    """The stack (ranks padded) and its heads, weight (K, width), bias (K,)."""
    made = [
        ll.init(task.model, ll.LoRAConfig(r=r, alpha=2.0 * r, target_names=TARGETS), seed=seed)
        for _, r, seed in grid
    ]
    names = [f"lr {lr:g}, r {r}, seed {seed}" for lr, r, seed in grid]
    heads = {
        "weight": torch.zeros(len(grid), task.head()["weight"].shape[1]),
        "bias": torch.zeros(len(grid)),
    }
    return ll.stack(dict(zip(names, made, strict=True))), heads


# ----------------------------------------------------------------------------------------- training
class Together:
    """The adapters of a grid as one stack: one forward, one backward, one optimizer a step."""

    def __init__(
        self, task: SentimentTask, grid: tuple[tuple[float, int, int], ...], steps: int
    ) -> None:
        self.task, self.grid, self.steps, self.step = task, grid, steps, 0
        self.words = [batches(task, seed, steps) for _, _, seed in grid]
        stack, self.heads = start(task, grid)
        self.trainable, self.frozen = ll.partition(stack)
        self.rates = torch.tensor([lr for lr, _, _ in grid])
        self.optimizer = ll.adamw(self.rates)
        self.state = self.optimizer.init(self.trainable)
        self.head_optimizer = torch.optim.AdamW(
            list(self.heads.values()), lr=HEAD_RATE, weight_decay=0.0
        )
        self.ids = torch.arange(len(grid)).repeat_interleave(WORDS)

    def __call__(self) -> None:
        """One step of every adapter."""
        batch = self.task._encoded(
            [word for words in self.words for word in words[self.step % self.steps]]
        )
        live = pytree.tree_map(lambda t: t.detach().requires_grad_(), self.trainable)
        for head in self.heads.values():
            head.requires_grad_().grad = None
        hidden = pooled(
            self.task.model, ll.rows(ll.combine(live, self.frozen), self.ids), batch
        ).unflatten(0, (-1, WORDS))
        found = (hidden * self.heads["weight"].unsqueeze(1)).sum(-1) + self.heads["bias"].unsqueeze(
            1
        )  # (K, words)
        (found - batch["ratings"].unflatten(0, (-1, WORDS))).square().mean(1).sum().backward()
        factor = cosine(self.step, self.steps)
        grads, _ = ll.clip_grads(pytree.tree_map(lambda t: t.grad, live), 1.0)
        self.trainable, self.state = self.optimizer.update(
            grads, self.state, self.trainable, lr=self.rates * factor
        )
        self.head_optimizer.param_groups[0]["lr"] = HEAD_RATE * factor
        self.head_optimizer.step()
        self.step += 1

    @property
    def stack(self) -> ll.Adapter:
        """The adapters as they are now."""
        return pytree.tree_map(lambda t: t.detach(), ll.combine(self.trainable, self.frozen))


class Alone:
    """One adapter as everybody trains one: a bound model (ours or PEFT's), torch.optim.AdamW."""

    def __init__(self, task: SentimentTask, model: Any, lr: float, seed: int, steps: int) -> None:
        self.task, self.model, self.lr, self.steps, self.step = task, model, lr, steps, 0
        self.words = batches(task, seed, steps)
        self.head = task.head()
        self.leaves = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": self.leaves, "lr": lr},
            {"params": list(self.head.values()), "lr": HEAD_RATE},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def __call__(self) -> None:
        """One step."""
        batch = self.task._encoded(self.words[self.step % self.steps])
        for head in self.head.values():
            head.requires_grad_()
        self.optimizer.zero_grad()
        found = F.linear(
            pooled(self.model, None, batch), self.head["weight"], self.head["bias"]
        ).squeeze(-1)
        F.mse_loss(found, batch["ratings"]).backward()
        torch.nn.utils.clip_grad_norm_(self.leaves, 1.0)
        for group, lr in zip(self.optimizer.param_groups, (self.lr, HEAD_RATE), strict=True):
            group["lr"] = lr * cosine(self.step, self.steps)
        self.optimizer.step()
        self.step += 1


def peft_model(task: SentimentTask, r: int) -> Any:
    """The encoder under PEFT's LoRA of the same rank."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        copy.deepcopy(task.model), LoraConfig(r=r, lora_alpha=2 * r, target_modules=".*" + TARGETS)
    )


def speed(task: SentimentTask, rounds: int) -> None:
    """Print a step of all 16 at once over 16 steps one after another, on the same batches."""
    steps = 3 * rounds
    together = Together(task, GRID, steps)
    bound = {
        r: ll.init(task.model, ll.LoRAConfig(r=r, alpha=2.0 * r, target_names=TARGETS))
        for r in RANKS
    }
    ours = [
        Alone(task, ll.bind(task.model, pytree.tree_map(torch.clone, bound[r])), lr, seed, steps)
        for lr, r, seed in GRID
    ]
    theirs = {
        r: peft_model(task, r) for r in RANKS
    }  # a model per rank: 16 copies of the encoder would be PEFT's loss, not its pace
    peft = [Alone(task, theirs[r], lr, seed, steps) for lr, r, seed in GRID]
    times: dict[str, list[float]] = {"together": [], "ours": [], "PEFT": [], "again": []}
    for turn in range(rounds + 2):
        for name, runs in (
            ("together", [together]),
            ("ours", ours),
            ("PEFT", peft),
            ("again", [together]),
        ):
            begin = time.perf_counter()
            for run in runs:
                run()
            if turn > 1:
                times[name].append(time.perf_counter() - begin)
    ratio = {
        name: statistics.median(t / b for t, b in zip(ts, times["together"], strict=True))
        for name, ts in times.items()
    }
    print(
        f"\na step of 16 adapters x {WORDS} words: at once "
        f"{statistics.median(times['together']) * 1e3:.0f} ms"
    )
    print(
        f"one after another: ours {ratio['ours']:.2f}x that, PEFT's {ratio['PEFT']:.2f}x (at "
        f"once again {ratio['again']:.2f}x)"
    )


# ------------------------------------------------------------------------------------------ results
@torch.no_grad()
def predictions(
    task: SentimentTask, stack: ll.Adapter, heads: Heads, limit: int
) -> tuple[Tensor, Tensor]:
    """(K, n) ratings of the held-out words by every adapter, and what people said (n,)."""
    held_out = task.held_out[:limit]
    found = []
    for i, adapter in enumerate(ll.unstack(stack)):
        bound = ll.merged(task.model, adapter)
        parts = [task._encoded(held_out[j : j + 256]) for j in range(0, len(held_out), 256)]
        found.append(
            torch.cat(
                [
                    pooled(bound, None, part) @ heads["weight"][i] + heads["bias"][i]
                    for part in parts
                ]
            )
        )
    return torch.stack(found), torch.tensor([rating for _, rating in held_out])


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's r."""
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def report(found: Tensor, asked: Tensor, plot: Path) -> None:
    """Print the table and the ensemble's gain; draw its spread against its error."""
    scores = [pearson(row, asked) for row in found]
    print("\nPearson r      " + "".join(f"lr {lr:<8g}" for lr in RATES))
    for r, seed in itertools.product(RANKS, SEEDS):
        row = (scores[GRID.index((lr, r, seed))] for lr in RATES)
        print(f"r {r:<3} seed {seed}   " + "".join(f"{score:<11.3f}" for score in row))
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:8]
    mean, spread = found[best].mean(0), found[best].std(0)
    error = (mean - asked).abs()
    middle = statistics.mean(scores[i] for i in best)
    print(
        f"\nbest alone {max(scores):.3f}; the best 8 alone {middle:.3f} on average, as an "
        f"ensemble {pearson(mean, asked):.3f}"
    )
    parts = [p.tolist() for p in torch.arange(len(spread))[spread.argsort()].chunk(8)]
    xs, ys = ([values[p].mean().item() for p in parts] for values in (spread, error))
    print(
        f"mean error, from the eighth of words where the 8 agree most to where least: "
        f"{'  '.join(f'{y:.2f}' for y in ys)}"
    )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.scatter(spread, error, s=6, alpha=0.25, linewidths=0, label="a held-out word")
    axes.plot(xs, ys, "o-", color="black", label="mean of an eighth of them")
    axes.set(
        xlabel="spread of 8 adapters' ratings",
        ylabel="error of their mean",
        title="An ensemble's spread against its error",
    )
    axes.legend()
    figure.savefig(plot, dpi=120)
    print(f"drawn: {plot}")


@torch.no_grad()
def serve(task: SentimentTask, stack: ll.Adapter, heads: Heads) -> None:
    """Print one word's rating by each of the 16, in one batch."""
    word, rating = task.held_out[0]
    batch = task._encoded([(word, rating)] * len(GRID))
    hidden = pooled(task.model, ll.rows(stack, list(ll.names(stack) or ())), batch)
    mixed = (hidden * heads["weight"]).sum(-1) + heads["bias"]
    single = task._encoded([(word, rating)])
    states = torch.cat([pooled(task.model, adapter, single) for adapter in ll.unstack(stack)])
    loop = (states * heads["weight"]).sum(-1) + heads["bias"]
    print(
        f"\none batch, a row per adapter: {word!r}, rated {rating:.1f} by people: "
        f"{mixed.min():.2f} to {mixed.max():.2f}; ",
        end="",
    )
    print(f"one after another differs by at most {(mixed - loop).abs().max():.1e}")


def gathered(stack: ll.Adapter, heads: Heads) -> tuple[ll.Adapter, Heads]:
    """Every process's members as one stack, in order of rank."""
    if not dist.is_initialized():
        return stack, heads
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (stack, {n: t.detach() for n, t in heads.items()}))
    return ll.concatenate([s for s, _ in parts]), {
        n: torch.cat([h[n] for _, h in parts]) for n in heads
    }


def main() -> None:
    """Train, time, tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few steps and words: shows that it runs"
    )
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--plot", type=Path, default=Path("sweep.png"))
    given = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.set_num_threads(max(1, 2 // world))
    task = sentiment.load(None, batch=WORDS, seed=0, device="cpu")
    own = GRID[rank * len(GRID) // world : (rank + 1) * len(GRID) // world]
    steps = 8 if given.quick else given.steps
    run, begin = Together(task, own, steps), time.perf_counter()
    for _ in range(steps):
        run()
    stack, heads = gathered(run.stack, {n: t.detach() for n, t in run.heads.items()})
    if rank == 0:
        print(
            f"{task.title}\n{len(GRID)} adapters x {steps} steps x {WORDS} words in "
            f"{time.perf_counter() - begin:.0f} s by {world}"
        )
        found, asked = predictions(task, stack, heads, 64 if given.quick else 600)
        report(found, asked, given.plot)
        serve(task, stack, heads)
        if world == 1:
            speed(task, 2 if given.quick else 5)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
