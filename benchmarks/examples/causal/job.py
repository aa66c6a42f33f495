"""What the arguments ask for, loaded: the base, the examples, the adapter, the recipe."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_lite_func as ll
from lora_lite_func.cli.method_options import settings

from . import methods, readings
from .data import Example, data_hash, read, shuffled, split
from .encoding import Encoded, encode, kept, padded
from .evaluation import Evaluator
from .losses import calibration, check_packing
from .models import folder, load_model, load_tokenizer
from .number_words import numbers
from .training import Feed, Recipe

__all__ = ["Job", "load", "new_adapter", "new_feed", "recipe"]

CALIBRATION = 16  # batches
NUMBERS = {"train": 1200, "valid": 50, "test": 200}
MODELS = Path("runs/models")


@dataclass(frozen=True)
class Job:
    """A base and its examples.

    Attributes:
        args: the command line.
        source: folder of the base's files.
        model: the base.
        tokenizer: its tokenizer.
        rows: what is learned, encoded.
        valid: what the best checkpoint is chosen by.
        test: what is scored at the end.
        hash: of all examples.
        evaluate: the evaluator.
        remarks: what was left out, cut or changed.
    """

    args: argparse.Namespace
    source: Path
    model: Any
    tokenizer: Any
    rows: list[Encoded]
    valid: list[Example]
    test: list[Example]
    hash: str
    evaluate: Evaluator
    remarks: list[str]

    def calibration(self) -> dict[str, Any]:
        """The keywords of `ll.init` for methods that start from data."""
        pad, size = self.tokenizer.pad_token_id, self.args.batch
        batches = []
        for i in range(0, min(len(self.rows), CALIBRATION * size), size):
            batch = padded(self.rows[i : i + size], pad)
            batches.append({name: t.to(self.args.device) for name, t in batch.items()})
        return calibration(batches)


def load(args: argparse.Namespace) -> Job:
    """The job of a command line. What is wrong with the data is said before the base is loaded."""
    train, valid, test = _examples(args)
    source = folder(args.model, MODELS)
    tokenizer = load_tokenizer(source)
    rows, said = kept(
        [encode(tokenizer, example, args.chat) for example in train], args.max_tokens, args.too_long
    )
    if not rows:
        raise SystemExit(f"--data: no example is left; {said}")
    model = load_model(source, device=args.device, dtype=args.dtype, quantization=args.quantization)
    if args.pack and len(rows) > 1:
        check_packing(model, rows, tokenizer.pad_token_id, args.device)
    if args.checkpointing:
        new = getattr(
            model, "activation_checkpointing_enable", None
        )  # its name from transformers 5
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    evaluate = Evaluator(
        model,
        tokenizer,
        args.score,
        args.chat,
        args.eval_batch,
        args.max_new_tokens,
        args.device,
    )
    found = data_hash(train, valid, test)
    remarks = [f"training examples: {said}"] if said else []
    return Job(args, source, model, tokenizer, rows, valid, test, found, evaluate, remarks)


def _examples(args: argparse.Namespace) -> tuple[list[Example], list[Example], list[Example]]:
    """(to learn, to choose by, to score at the end)."""
    limit = readings.limits(args)
    name, _, language = args.data.partition(":")
    if name == readings.NUMBERS and not Path(args.data).is_file():
        sizes = [limit[part] or size for part, size in NUMBERS.items()]
        train, valid, test = numbers(language or "de", sizes, args.seed)
    else:
        train, chosen = read(Path(args.data)), readings.valid_of(args)
        if isinstance(chosen, Path):
            held_out = read(chosen)
            train = [train[i] for i in shuffled(len(train), args.seed)]
        else:
            train, held_out = split(train, chosen, args.seed)
        train, valid = train[: limit["train"]], held_out[: limit["valid"]]
        test = held_out[: limit["test"]]
    if args.test is not None:
        test = read(args.test, limit["test"])
    if not train or not valid:
        raise SystemExit(
            f"{args.data}: {len(train)} to learn and {len(valid)} held out are too few"
        )
    return train, valid, test


# ------------------------------------------------------------------------------------- what is made
def new_adapter(job: Job, **changes: Any) -> tuple[ll.Adapter, list[str]]:
    """A new adapter as the arguments ask for, with remarks; `changes` are other values of r, alpha,
    seed and fields of the method's config.
    """
    args = job.args
    own = {n: v for n, v in changes.items() if n not in ("r", "alpha", "seed")}
    cfg, remarks = methods.config(
        args.method,
        r=changes.get("r", args.r),
        alpha=changes.get("alpha", args.alpha),
        targets=args.targets,
        layers=readings.layers(args),
        settings={**settings(args.settings), **own},
    )
    cfg, more = methods.fits(job.model, cfg, args.targets is not None)
    needs = ll.variants()[args.method].needs_of(cfg)
    if "pairs" in needs:
        raise SystemExit(f"{args.method} starts from contrastive pairs, which this data hasn't")
    data = job.calibration() if needs & {"inputs", "gradients"} else {}
    try:
        params = ll.init(job.model, cfg, seed=changes.get("seed", args.seed), **data)
    except ll.LoraLiteError as error:
        raise SystemExit(f"{args.method}: {error}") from None
    return params, remarks + more


def new_feed(job: Job, seed: int | None = None) -> Feed:
    """The batches of the training."""
    args = job.args
    return Feed(
        job.rows,
        batch=args.batch,
        pad=job.tokenizer.pad_token_id,
        seed=args.seed if seed is None else seed,
        device=args.device,
        width=args.max_tokens if args.pack else None,
    )


def recipe(args: argparse.Namespace, feed: Feed) -> Recipe:
    """How long and how fast to train."""
    return Recipe(
        steps=args.steps or feed.steps(args.epochs, args.accumulate),
        lr=args.lr or methods.learning_rate(args.method),
        schedule=args.schedule,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        clip=args.clip,
        accumulate=args.accumulate,
    )
