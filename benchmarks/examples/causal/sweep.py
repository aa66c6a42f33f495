"""A grid of adapters trained as one stack: one pass of the base a step for all of them.

Members that don't stack (another method's settings, ranks that can't be padded with what changes
nothing) make groups, each a stack of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

import lora_lite_func as ll
from lora_lite_func.cli.method_options import settings

from . import methods, readings, results
from .job import Job, new_adapter, new_feed, recipe
from .progress import progress
from .sweep_results import Member, Scored, conclude, rank, table
from .training import Trainer

__all__ = ["groups", "members", "run", "speed", "trained"]


def run(job: Job, argv: Sequence[str] | None) -> int:
    """Train the grid, print the table and the speed-up, keep the best; 0."""
    made = members(job)
    stacks = groups(made, job.args.together)
    folder = results.new_folder(job.args.out, f"sweep-{job.args.method}")
    sizes = " + ".join(str(len(group)) for group in stacks)
    print(
        f"{len(made)} adapters in stacks of {sizes}; {len(job.rows):,} examples to learn; {folder}"
    )
    started = time.perf_counter()
    scored: list[Scored] = []
    for number, group in enumerate(stacks):
        done = trained(job, group)
        ll.save(
            ll.stack({member.name: member.params for member in done}),
            folder / f"stack-{number}.safetensors",
        )
        sample = job.valid[: job.args.eval_sample]
        scored += [Scored(member, job.evaluate(member.params, sample)) for member in done]
    seconds = time.perf_counter() - started
    best = min(scored, key=lambda s: rank(s.outcome, job.args.best))
    print(f"\n{table(scored, best)}\n")
    ratio = speed(job, max(stacks, key=len))
    print(ratio)
    ll.save(best.member.params, folder / "best.safetensors")
    conclude(job, folder, best, seconds, ratio, argv)
    return 0


def members(job: Job) -> list[Member]:
    """The adapters of the grid at their start, in its order."""
    made = []
    for point in readings.grid(job.args):
        values = {name: _value(name, text) for name, text in point.items()}
        rate = values.pop("lr", job.args.lr or methods.learning_rate(job.args.method))
        params, remarks = new_adapter(job, **values)
        name = ", ".join(f"{name} {text}" for name, text in point.items())
        for remark in remarks:
            print(f"! {name}: {remark}")
        made.append(Member(name, rate, params))
    return made


def _value(name: str, text: str) -> Any:
    """A list's entry: a number for rates and ranks, a Python literal for a method's field."""
    kinds = {"lr": float, "alpha": float, "r": int, "seed": int}
    try:
        return kinds[name](text) if name in kinds else settings([f"{name}={text}"])[name]
    except ValueError:
        raise SystemExit(f"--sweep: {name}: expected a number, found {text!r}") from None


def groups(made: Sequence[Member], most: int) -> list[list[Member]]:
    """The members in groups of at most `most` that stack."""
    found: list[list[Member]] = []
    for member in made:
        home = next((g for g in found if len(g) < most and _stacks(g[0], member)), None)
        if home is None:
            found.append([member])
        else:
            home.append(member)
    return found


def _stacks(one: Member, other: Member) -> bool:
    try:
        ll.stack([one.params, other.params])
    except ll.StructureError:
        return False
    return True


def _trainer(job: Job, group: Sequence[Member]) -> Trainer:
    feed = new_feed(job)
    stacked = ll.stack({member.name: member.params for member in group})
    rates = torch.tensor([member.rate for member in group], device=job.args.device)
    return Trainer(job.model, stacked, feed, recipe(job.args, feed), rates)


def trained(job: Job, group: Sequence[Member]) -> list[Member]:
    """The group's members after all steps."""
    trainer = _trainer(job, group)
    state = trainer.new()
    job.model.train()
    with progress(f"{len(group)} adapters", trainer.recipe.steps) as bar:
        while state.step < trainer.recipe.steps:
            state, told = trainer(state)
            bar.step(f"losses {min(told.losses):.3f} to {max(told.losses):.3f}")
    job.model.eval()
    after = ll.unstack(trainer.adapter(state))
    return [Member(m.name, m.rate, params) for m, params in zip(group, after, strict=True)]


# -------------------------------------------------------------------------------------------- speed
def speed(job: Job, group: Sequence[Member], rounds: int = 3) -> str:
    """How long a step of the stack takes over the same steps one after another, in words; the
    least of some rounds, taken in turn.
    """
    feed = new_feed(job)
    plan = recipe(job.args, feed)
    together = [_trainer(job, group)]
    alone = [Trainer(job.model, member.params, feed, plan) for member in group]
    job.model.train()
    times: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for taken, trainers in zip(times, (together, alone), strict=True):
            begin = time.perf_counter()
            for trainer in trainers:
                trainer(trainer.new())
            if turn:
                taken.append(time.perf_counter() - begin)
    job.model.eval()
    stacked, single = (min(taken) for taken in times)
    return (
        f"a step of {len(group)} adapters: {stacked:.2f} s as a stack, {single:.2f} s one by one, "
        f"{single / stacked:.2f}x"
    )
