"""The causal task of `benchmarks.examples.finetune`, which compares methods epoch by epoch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..training import Batch, Evaluation, Params
from .data import Example, read, shuffled, split
from .encoding import Encoded, encode, kept, padded
from .evaluation import Evaluator
from .losses import calibration, row_losses
from .models import load_model, load_tokenizer

__all__ = ["CausalTask", "load"]

HELD_OUT = 0.2
CALIBRATION = 16  # batches
EVAL_BATCH = 32


@dataclass
class CausalTask:
    """Prompts with responses: cross-entropy on the response and the end token, the final number of
    greedy generation for the score.
    """

    model: Any
    tokenizer: Any
    source: Path
    train: list[Encoded]
    held_out: list[Example]
    batch: int = 4
    seed: int = 0
    device: str = "cpu"
    max_new_tokens: int = 300
    title: str = ""
    metric: str = "exact match"
    baseline: str = "base"
    reference: str = "the bare base's forward on the same batch, no graph and no update"

    def head(self) -> dict[str, Tensor]:
        """None: the language model has its own."""
        return {}

    def batches(self, epoch: int) -> list[Batch]:
        """The training examples, shuffled by (seed, epoch)."""
        order = [self.train[i] for i in shuffled(len(self.train), 1_000_003 * self.seed + epoch)]
        size, pad = self.batch, self.tokenizer.pad_token_id
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        return [{k: t.to(self.device) for k, t in padded(part, pad).items()} for part in parts]

    def pairs(self) -> dict[str, Any]:
        """None: prompts have no counterparts."""
        return {}

    def calibration(self) -> dict[str, Any]:
        """Training batches and their loss."""
        return calibration(self.batches(0)[:CALIBRATION])

    def loss(self, params: Params, head: dict[str, Tensor], batch: Batch) -> Tensor:
        """Mean cross-entropy of the response tokens."""
        sums, counts = row_losses(self.model, params, batch)
        return sums.sum() / counts.sum()

    @torch.no_grad()
    def evaluate(self, params: Params, head: dict[str, Tensor]) -> Evaluation:
        """The part of the held-out prompts whose generated answer ends in the right number; outputs
        are the responses' mean losses.
        """
        score = Evaluator(
            self.model,
            self.tokenizer,
            "number",
            False,
            EVAL_BATCH,
            self.max_new_tokens,
            self.device,
        )
        found = score(params, self.held_out)
        return Evaluation(found.score, torch.tensor(found.losses), found.texts)

    def fresh(self) -> CausalTask:
        """The same examples around a model loaded again."""
        return dataclasses.replace(self, model=load_model(self.source, device=self.device))


def load(
    source: Path,
    file: Path,
    held_out: Path | None,
    *,
    batch: int,
    seed: int,
    device: str,
    max_tokens: int = 768,
    max_new_tokens: int = 300,
    limit: int | None = None,
) -> CausalTask:
    """The task, with the model of a folder in eval mode and in the dtype of its files.

    Args:
        source: folder of a causal language model's files.
        file: examples to learn.
        held_out: examples for the score; without it the last fifth of `file`, shuffled by the seed,
            is held out.
        batch: examples per step.
        seed: of the split and the order.
        device: where the model goes.
        max_tokens: longer examples are left out.
        max_new_tokens: how far generation may go.
        limit: take that many examples of each file only.
    """
    tokenizer, examples = load_tokenizer(source), read(file)
    train = [examples[i] for i in shuffled(len(examples), seed)][:limit]
    if held_out is None:
        train, test = split(train, HELD_OUT, seed)
    else:
        test = read(held_out, limit)
    rows, said = kept([encode(tokenizer, example) for example in train], max_tokens, "drop")
    if not rows or not test:
        raise SystemExit(f"{file}: {len(rows)} to learn and {len(test)} held out are too few")
    title = f"Responses to prompts: {len(rows):,} to learn, {len(test):,} held out"
    if said:
        print(f"! training examples: {said}")
    model = load_model(source, device=device)
    return CausalTask(
        model, tokenizer, source, rows, test, batch, seed, device, max_new_tokens, title
    )
