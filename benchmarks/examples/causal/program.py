"""The program: a new run, a resumed one, or a sweep; what it prints and what it returns."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

import lora_lite_func as ll

from ...measure.harness import machine, versions
from .. import checks
from . import plots, results, sweep
from .evaluation import Outcome
from .job import Job, load, new_adapter, new_feed, recipe
from .loop import BEST, LOG, LOOKS, Run, fit, note_texts, restored
from .options import arguments
from .training import Trainer

__all__ = ["main"]

OPTIONS = "options.json"
PATHS = ("test", "out", "resume")


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments ask for.

    Returns:
        0; 1 where a saved adapter comes back otherwise or the base has changed; 130 when stopped.
    """
    args = arguments(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    started = time.perf_counter()
    torch.manual_seed(args.seed)  # of dropout; everything else has a generator of its own
    if args.sweep:
        return sweep.run(load(args), argv)
    run = _resumed(args) if args.resume else _started(args)
    if not fit(run):
        return 130
    return _finished(run, started, sys.argv[1:] if argv is None else argv)


def _started(args: argparse.Namespace) -> Run:
    job = load(args)
    params, remarks = new_adapter(job)
    folder = results.new_folder(args.out, args.method)
    given = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    results.write_json(folder / OPTIONS, given)
    run = _run(job, folder, params)
    recipe = run.trainer.recipe
    print(
        f"{args.method}: {ll.num_params(params):,} numbers on {len(params)} sites of {args.model}\n"
        f"{len(job.rows):,} examples to learn, {len(job.valid):,} to choose the best by, "
        f"{len(job.test):,} to score (data {job.hash})\n"
        f"{recipe.steps} steps of {args.batch} x {args.accumulate} "
        f"{'packed rows' if args.pack else 'examples'}, lr {recipe.lr:g}, {recipe.schedule}; "
        f"in {folder}"
    )
    for remark in (*job.remarks, *remarks):
        print(f"! {remark}")
    return run


def _resumed(asked: argparse.Namespace) -> Run:
    """A run as its folder has it: its own options, but for where to stop."""
    folder = asked.resume
    try:
        given = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
    except OSError:
        raise SystemExit(f"--resume: {folder} has no {OPTIONS}; expected a run's folder") from None
    given |= {name: given[name] and Path(given[name]) for name in PATHS}
    given["stop_at"] = asked.stop_at
    job = load(argparse.Namespace(**given))
    run = restored(_run(job, folder, new_adapter(job)[0]))
    print(f"goes on after step {run.state.step} of {run.steps}, in {folder}")
    return run


def _run(job: Job, folder: Path, params: ll.Adapter) -> Run:
    feed = new_feed(job)
    trainer = Trainer(job.model, params, feed, recipe(job.args, feed))
    return Run(job, folder, trainer, trainer.new())


# ---------------------------------------------------------------------------------------- the end
def _finished(run: Run, started: float, argv: Sequence[str]) -> int:
    """Score the best adapter on all test examples, write and print the results."""
    job, args = run.job, run.job.args
    adapter = ll.load(run.folder / BEST, job.model, device=args.device)
    base = job.evaluate((), job.test) if args.baseline else None
    final = job.evaluate(adapter, job.test)
    note_texts(run.folder, run.best["step"], final)
    facts = _facts(run)
    row = _summary(run, base, final, time.perf_counter() - started, argv)
    looks, log = (results.json_lines(run.folder / name) for name in (LOOKS, LOG))
    results.write_json(
        run.folder / "result.json",
        {
            **row,
            "looks": looks,
            "config": repr(adapter.config),
            "versions": {"lora_lite_func": ll.__version__, **versions()},
            "machine": machine(next(job.model.parameters()).device),
            "checks": [fact._asdict() for fact in facts],
        },
    )
    summary = results.append_summary(args.out, row)
    pictures = plots.drawn(run.folder, log, looks, f"{args.method} on {args.model}")
    print(f"\n{results.examples_text(job.test, final, args.examples)}\n\n{_told(run, base, final)}")
    spent = f"{row['seconds']} s, {row['cpu_seconds']} s of processors"
    print(f"peak memory {row['peak_mib']:,} MiB; {spent}")
    for fact in facts:
        print(f"{'ok  ' if fact.holds else 'FAIL'} {fact.text}")
    drawn = " and ".join(file.name for file in pictures) or "no curves (matplotlib isn't installed)"
    print(f"{run.folder}: adapters, log, every generated text, {drawn}; a line in {summary}")
    return 0 if all(fact.holds for fact in facts) else 1


def _told(run: Run, base: Outcome | None, final: Outcome) -> str:
    count, best = len(final.right), run.best
    before = f"base {base.score:.3f} right (loss {base.loss:.4f}); " if base else ""
    return (
        f"of {count:,} test examples: {before}{run.job.args.method} {final.score:.3f} right "
        f"(loss {final.loss:.4f}), as of step {best['step']}, the best in validation"
    )


def _facts(run: Run) -> list[checks.Fact]:
    """That the saved adapter is the trained one, bit by bit, and the base what its files hold."""
    saved = ll.load(run.folder / "last.safetensors", device=run.job.args.device)
    pairs = zip(pytree.tree_leaves(saved), pytree.tree_leaves(run.adapter), strict=True)
    same = all(bool((a == b).all()) for a, b in pairs)
    facts = [checks.Fact("file", same, "the adapter's file holds what was trained, bit by bit")]
    if run.job.args.quantization == "none" and run.job.args.dtype == "auto":
        facts.append(checks.base_fact(run.job.model, run.job.source, {}, "the run"))
    return facts


def _summary(
    run: Run, base: Outcome | None, final: Outcome, seconds: float, argv: Sequence[str]
) -> dict[str, Any]:
    args, recipe, cfg = run.job.args, run.trainer.recipe, run.adapter.config
    return {
        "method": args.method,
        "score": round(final.score, 4),
        "base_score": round(base.score, 4) if base else "",
        "loss": round(final.loss, 5),
        "base_loss": round(base.loss, 5) if base else "",
        "test_examples": len(final.right),
        "best_step": run.best["step"],
        "steps": recipe.steps,
        "examples_per_step": args.batch * args.accumulate,
        "lr": recipe.lr,
        "r": cfg.r,
        "alpha": cfg.alpha,
        "trainable": ll.num_params(run.trainer.start),
        "model": args.model,
        "data": run.job.hash,
        "commit": results.commit(),
        "peak_mib": round(results.peak_mib(args.device)),
        "seconds": round(seconds),
        "cpu_seconds": round(time.process_time()),
        "folder": str(run.folder),
        "arguments": " ".join(argv),
    }
