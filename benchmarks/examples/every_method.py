"""Every method on the sentiment task, at a rate chosen on a validation split, with several seeds.

    python -m benchmarks.examples.every_method --out every.json
    python -m benchmarks.examples.every_method --report every.json benchmarks/README.md

The words are split once: a fifth for the test, an eighth of the others for validation, the rest to
learn. The peak learning rate is searched among 1 and 3 times the powers of ten: uphill from the
method's entry in settings.py, by Pearson's r on the validation words after one epoch with the first
seed. At that rate an adapter is trained for one epoch with each seed (of the adapter and of the
order of the batches), and scored on the test words, which nothing was chosen by. The file is
written after each method, and a method in it isn't run again, so that a run can be cut off and go
on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lora_lite_func as ll

from ..measure.harness import machine, versions
from ..measure.results import put_between
from . import sentiment
from .finetune import FALLBACK, chosen, started
from .sentiment import TARGETS, SentimentTask
from .settings import LEARNING_RATES, config
from .training import Run, stepper

__all__ = ["main", "next_rate", "split", "table"]

HEAD_ONLY = "head-only"
SEEDS = (0, 1, 2)
TRIALS = 6  # rates tried at most
VALIDATION = 0.125  # of the words that aren't the test's
BEGIN, END = (
    "<!-- every method: rendered by python -m benchmarks.examples.every_method --report -->",
    "<!-- end of every method -->",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the file lacks, or render its table into a page. Returns 0."""
    args = _parser().parse_args(argv)
    if args.report:
        _report(*args.report)
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    learning, validation = split(
        sentiment.load(None, batch=32, seed=0, device="cpu", limit=args.limit)
    )
    words = sum(map(len, (learning.train, validation.held_out, learning.held_out)))
    result = _opened(args.out, words)
    for method in [HEAD_ONLY, *chosen(args.variants)]:
        if method in result["methods"]:
            continue
        try:
            found = study(method, learning, validation)
        except ll.LoraLiteError as error:
            found = {"left_out": str(error)}
        result["methods"][method] = found
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(_line(method, found), flush=True)
    return 0


def split(task: SentimentTask) -> tuple[SentimentTask, SentimentTask]:
    """Return (the task that learns and is scored on the test words, the same scored on the
    validation words).

    Both learn the same words, of which neither the test's nor the validation's are any.
    """
    cut = round((1.0 - VALIDATION) * len(task.train))
    words, kept = task.train[:cut], task.train[cut:]
    learning = dataclasses.replace(task, train=words)
    held_out = sentiment.by_length(task.tokenizer, kept)
    return learning, dataclasses.replace(learning, held_out=held_out)


def study(method: str, learning: SentimentTask, validation: SentimentTask) -> dict[str, Any]:
    """Search a method's rate, train it with each seed, and return its row as JSON takes it.

    Raises:
        LoraLiteError: the method can't be made on this task.
    """
    start = time.perf_counter()
    rate: float | None = _nearest_rate(LEARNING_RATES.get(method, FALLBACK))
    if method == HEAD_ONLY:
        rate = LEARNING_RATES["head"]
    tried: dict[float, float] = {}
    runs: dict[float, Run] = {}
    while rate is not None and len(tried) < TRIALS:
        runs[rate] = trained(method, rate, SEEDS[0], learning)
        tried[rate] = score(runs[rate], validation)
        rate = None if method == HEAD_ONLY else next_rate(tried)
    best = max(tried, key=lambda rate: tried[rate])
    chosen_runs = [runs[best], *(trained(method, best, seed, learning) for seed in SEEDS[1:])]
    return {
        "lr": best,
        "validation": {f"{rate:g}": round(found, 6) for rate, found in sorted(tried.items())},
        "test": [round(score(run, learning), 6) for run in chosen_runs],
        "trainable": chosen_runs[0].trainable,
        "seconds": round(time.perf_counter() - start, 1),
    }


def trained(method: str, lr: float, seed: int, task: SentimentTask) -> Run:
    """Train a new adapter and a new head for an epoch, or until the loss isn't a number."""
    task = dataclasses.replace(task, seed=seed)
    run = Run(method, lr, _adapter(method, seed, task), task.head())
    batches = task.batches(0)
    step = stepper(task, run, head_lr=LEARNING_RATES["head"], steps=len(batches))
    for batch in batches:
        if not math.isfinite(step(batch).item()):
            break
    return run


def score(run: Run, task: SentimentTask) -> float:
    """Pearson's r of a run on the task's held-out words; -1 where it isn't a number."""
    found = task.evaluate(run.params, run.head).score
    return found if math.isfinite(found) else -1.0


def _adapter(method: str, seed: int, task: SentimentTask) -> Any:
    if method == HEAD_ONLY:
        return ()
    return started(task, config(method, r=8, targets=TARGETS), seed)


# -------------------------------------------------------------------------------------- the search
def next_rate(tried: dict[float, float]) -> float | None:
    """The rate to try next: beside the best one so far, below it first; None if both are known.

    Args:
        tried: {a rate, 1 or 3 times a power of ten: its score}.
    """
    best = max(tried, key=lambda rate: tried[rate])
    return next((rate for rate in _neighbours(best) if rate not in tried), None)


def _neighbours(rate: float) -> tuple[float, float]:
    exponent = math.floor(math.log10(rate * 1.001))
    if rate / 10.0**exponent < 2:
        return float(f"3e{exponent - 1}"), float(f"3e{exponent}")
    return float(f"1e{exponent}"), float(f"1e{exponent + 1}")


def _nearest_rate(rate: float) -> float:
    """The nearest of 1 and 3 times the powers of ten, on a scale of logarithms."""
    exponent = math.floor(math.log10(rate))
    grid = [float(f"{digit}e{e}") for e in (exponent, exponent + 1) for digit in (1, 3)]
    return min(grid, key=lambda candidate: abs(math.log(candidate / rate)))


# --------------------------------------------------------------------------------------- the table
def table(result: dict[str, Any]) -> str:
    """The rows as a table, best mean first, with what can be said of a method that isn't above the
    head alone.
    """
    rows = {name: row for name, row in result["methods"].items() if "test" in row}
    head = rows[HEAD_ONLY]["test"]
    lines = [
        "| method | trainable | lr | Pearson r, mean | of the seeds, least to most | |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(rows, key=lambda name: -statistics.mean(rows[name]["test"])):
        row, scores = rows[name], rows[name]["test"]
        word = "" if name == HEAD_ONLY or min(scores) > max(head) else "not above the head alone"
        spread = f"{min(scores):.3f} to {max(scores):.3f}"
        lines.append(
            f"| {name} | {row['trainable']:,} | {row['lr']:g} | {statistics.mean(scores):.3f} | "
            f"{spread} | {word} |"
        )
    left_out = [name for name, row in result["methods"].items() if "left_out" in row]
    if left_out:
        lines += ["", f"Left out, since they don't fit the task: {', '.join(left_out)}."]
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    about = f"{result['words']:,} words in all, {len(SEEDS)} seeds; taken with {packages}."
    return "\n".join([*lines, "", about])


def _report(source: str, page: str) -> None:
    result = json.loads(Path(source).read_text(encoding="utf-8"))
    text = Path(page).read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page}: expected the marks {BEGIN!r} and {END!r}")
    Path(page).write_text(put_between(text, BEGIN, END, table(result)), encoding="utf-8")


def _opened(file: Path, words: int) -> dict[str, Any]:
    """What a file holds, or the head of a new one.

    Raises:
        SystemExit: the file's rows are of another number of words.
    """
    if file.exists():
        held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if held["words"] != words:
            raise SystemExit(f"{file}: expected rows of {words:,} words, found {held['words']:,}")
        return held
    about = {"lora_lite_func": ll.__version__, **versions()}
    host = machine(torch.device("cpu"))
    return {"versions": about, "machine": host, "words": words, "methods": {}}


def _line(method: str, found: dict[str, Any]) -> str:
    if "left_out" in found:
        return f"{method}: left out: {found['left_out']}"
    scores = " ".join(f"{score:.3f}" for score in found["test"])
    rates = " ".join(f"{rate}:{score:.3f}" for rate, score in found["validation"].items())
    return f"{method}: lr {found['lr']:g}; test {scores}; validation {rates}; {found['seconds']} s"


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.examples.every_method",
        description=__doc__,
        formatter_class=formatter,
    )
    add = parser.add_argument
    add("--variants", default="all", help="methods, comma-separated, or all (default)")
    add(
        "--out",
        type=Path,
        default=Path("every.json"),
        help="JSON file of the rows; those in it aren't run again (default every.json)",
    )
    add("--report", nargs=2, metavar=("JSON", "PAGE"), help="render a file's table into a page")
    add("--limit", type=int, metavar="N", help="take N of the words only (default all)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
