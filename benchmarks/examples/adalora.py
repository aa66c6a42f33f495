"""AdaLoRA's budget at work on the sentiment task, in 200 steps.

python -m benchmarks.examples.adalora
    The rank of every layer falls as the cubic schedule says. Each step is checked to leave as many
    triplets as the schedule allows; at the end the adapter is pruned and checked to be otherwise
    unchanged.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

import lora_lite_func as ll

from . import sentiment
from .checks import TOLERANCE, Fact
from .training import CLIP, cosine

__all__ = ["History", "main", "run"]

LR, HEAD_LR, PENALTY = 1e-2, 3e-3, 0.1


@dataclass
class History:
    """What happened: per step the loss, the budget and how many triplets were left; the ranks at
    the end per site.
    """

    losses: list[float] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it, print the table, write result.json and budget.png.

    Returns:
        0, or 1 where the budget wasn't kept or pruning changed a prediction.
    """
    args = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    task = sentiment.load(None, batch=args.batch, seed=args.seed, device="cpu", limit=args.limit)
    schedule = ll.adalora.Schedule(
        total_steps=args.steps,
        target_r=args.target_r,
        initial_steps=args.steps // 10,
        final_steps=3 * args.steps // 10,
        interval=max(1, args.steps // 40),
    )
    small, seen = run(task, schedule, r=args.r)
    args.out.mkdir(parents=True, exist_ok=True)
    ll.save(small, args.out / "adalora.safetensors")
    numbers = {k: v for k, v in vars(seen).items() if k != "facts"} | {
        "checks": [f._asdict() for f in seen.facts]
    }
    (args.out / "result.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    _plot(args.out / "budget.png", seen, schedule)
    print(f"\n{_table(seen)}\n\n{_ranks(seen.ranks)}\n")
    for fact in seen.facts:
        print(f"{'ok  ' if fact.holds else 'FAIL'} {fact.text}")
    return 0 if all(fact.holds for fact in seen.facts) else 1


def run(task: Any, schedule: ll.adalora.Schedule, *, r: int) -> tuple[ll.Adapter, History]:
    """Train an adapter that starts with rank r under a schedule; the pruned adapter, and what
    happened.

    Args:
        task: model, batches, loss, evaluate and head, as of `benchmarks.sentiment`.
        schedule: its total_steps are taken.
        r: rank of every site at the start.
    """
    cfg = ll.AdaLoRAConfig(
        r=r, alpha=2.0 * r, target_names=(sentiment.TARGETS,), dtype=torch.float32
    )
    params, head, seen = ll.init(task.model, cfg, seed=0), task.head(), History()
    state = ll.adalora.start(params, schedule)
    leaves = pytree.tree_leaves((params, head))
    optimizer = torch.optim.AdamW(
        [
            {"params": pytree.tree_leaves(params), "lr": LR},
            {"params": list(head.values()), "lr": HEAD_LR},
        ],
        weight_decay=0.0,
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, schedule.total_steps)
    )

    def loss_of(live: tuple[ll.Adapter, dict[str, Tensor]], batch: Any) -> tuple[Tensor, Tensor]:
        rating = task.loss(*live, batch)
        return rating + PENALTY * ll.adalora.orthogonality(live[0]), rating

    total = sum(site.r for site in params.sites.values())
    for step, batch in enumerate(
        tqdm(
            _endless(task, schedule.total_steps),
            total=schedule.total_steps,
            desc="adalora",
            unit="step",
        ),
        1,
    ):
        grads, rating = torch.func.grad(loss_of, has_aux=True)((params, head), batch)
        for leaf, g in zip(leaves, pytree.tree_leaves(grads), strict=True):
            leaf.grad = g
        torch.nn.utils.clip_grad_norm_(leaves, CLIP)
        optimizer.step()
        rate.step()
        chosen, state = ll.adalora.allocate(params, grads[0], state, step)
        pytree.tree_map(
            lambda t, v: t.copy_(v), params, chosen
        )  # the optimizer holds these tensors
        seen.losses.append(rating.item())
        seen.budgets.append(ll.adalora.budget(schedule, total, len(params), step))
        seen.left.append(sum(int(keep.sum()) for keep in state.keep.values()))
    small = ll.adalora.prune(params)
    seen.ranks = {path: small.sites[path].r if path in small.sites else 0 for path in params}
    seen.facts = [_budget_fact(seen, schedule, total), _prune_fact(task, params, small, head)]
    return small, seen


def _endless(task: Any, steps: int) -> Any:
    """So many batches, epoch after epoch."""
    done = epoch = 0
    while done < steps:
        for batch in task.batches(epoch)[: steps - done]:
            done += 1
            yield batch
        epoch += 1


# -------------------------------------------------------------------------------------------- facts
def _budget_fact(seen: History, schedule: ll.adalora.Schedule, total: int) -> Fact:
    """After each choice exactly the budget is left; between two the last choice's number."""
    first, last = schedule.initial_steps, schedule.total_steps - schedule.final_steps
    expected = total
    wrong = 0
    for step, (budget, left) in enumerate(zip(seen.budgets, seen.left, strict=True), 1):
        if (first < step <= last and step % schedule.interval == 0) or step == last + 1:
            expected = budget
        wrong += left != expected
    ends = f"{seen.left[0]} triplets at first, {seen.left[-1]} from step {last + 1} on"
    return Fact(
        "budget",
        wrong == 0,
        f"budget: {len(seen.left) - wrong} of {len(seen.left)} steps keep what the cubic allows; "
        f"{ends}",
    )


def _prune_fact(task: Any, params: ll.Adapter, small: ll.Adapter, head: dict[str, Tensor]) -> Fact:
    """The pruned adapter predicts what the whole one does."""
    whole, pruned = task.evaluate(params, head), task.evaluate(small, head)
    difference = (whole.outputs - pruned.outputs).abs().max().item()
    numbers = f"{ll.num_params(params):,} numbers became {ll.num_params(small):,}"
    predictions = f"{len(whole.outputs)} predictions differ by at most {difference:.1e}"
    text = f"pruned: {numbers}, {predictions}; {task.metric} {pruned.score:.3f}"
    return Fact(
        "prune",
        difference <= TOLERANCE * 10 and ll.num_params(small) < ll.num_params(params),
        text,
        difference,
    )


# ------------------------------------------------------------------------------------------- output
def _table(seen: History) -> str:
    """Every tenth of the run: budget, triplets left, mean loss."""
    steps, width = len(seen.losses), max(1, len(seen.losses) // 10)
    lines = [f"{'step':>5}  {'budget':>6}  {'left':>5}  loss"]
    for end in range(width, steps + 1, width):
        loss = sum(seen.losses[end - width : end]) / width
        lines.append(f"{end:>5}  {seen.budgets[end - 1]:>6}  {seen.left[end - 1]:>5}  {loss:.3f}")
    return "\n".join(lines)


def _ranks(ranks: dict[str, int]) -> str:
    """The rank that each site is left with."""
    wide = max(map(len, ranks))
    return "\n".join(
        [f"{'site':<{wide}}  rank", *(f"{path:<{wide}}  {r}" for path, r in ranks.items())]
    )


def _plot(file: Path, seen: History, schedule: ll.adalora.Schedule) -> None:
    """Triplets left over the steps, under the cubic; the ranks that are left, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    steps = range(1, len(seen.left) + 1)
    left.plot(steps, seen.budgets, color="0.6", linewidth=1.2, label="the cubic's budget")
    left.step(steps, seen.left, where="post", color="C0", linewidth=1.6, label="triplets left")
    left.set(
        xlabel="step", ylabel="triplets over all sites", xlim=(0, len(seen.left)), ylim=(0, None)
    )
    left.legend(frameon=False)
    right.bar(range(len(seen.ranks)), list(seen.ranks.values()), color="C0")
    right.axhline(schedule.target_r, color="0.45", linestyle="--", linewidth=1.0)
    right.set(xlabel="site, in order of its path", ylabel="rank left (dashed: the average)")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.examples.adalora",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=200, help="optimizer steps (default 200)")
    add("--r", type=int, default=12, help="rank at the start (default 12)")
    add("--target-r", type=int, default=4, help="average rank at the end (default 4)")
    add("--batch", type=int, default=32, help="examples per step (default 32)")
    add("--seed", type=int, default=0, help="of split and order (default 0)")
    add(
        "--out",
        type=Path,
        default=Path("runs/adalora"),
        help="folder for what is written (default runs/adalora)",
    )
    add("--limit", type=int, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
