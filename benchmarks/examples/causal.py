"""The causal task: a language model learns responses to prompts.

It is scored on the final number of what it generates, as lora-lite and PEFT's method comparison do
with MetaMathQA and GSM8K. A file has one JSON object a line, with the fields prompt and response,
query and response (MetaMathQA), or question and answer (GSM8K); the latter two are put in a
template.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_lite_func as ll

from .training import Batch, Evaluation, Params

__all__ = ["TARGETS", "CausalTask", "final_number", "load", "masked", "pairs"]

TARGETS = r"self_attn\.(q_proj|v_proj)$"
HELD_OUT = 0.2
CALIBRATION = 16  # batches
EVAL_BATCH = 32
IGNORED = -100  # the label that F.cross_entropy leaves out
TEMPLATE = "Question: {} Think step by step.\nAnswer:"
FIELDS = (("prompt", "response"), ("query", "response"), ("question", "answer"))
MARKERS = ("####", "The answer is:")
NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")

Pair = tuple[str, str]


@dataclass
class CausalTask:
    """Prompt and response pairs: cross-entropy on the response and the end token, greedy generation
    for the score.
    """

    model: Any
    tokenizer: Any
    source: Path
    train: list[Pair]
    held_out: list[Pair]
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
        """The training pairs, shuffled by (seed, epoch), encoded."""
        order = torch.randperm(
            len(self.train), generator=torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        ).tolist()
        rows = [self.train[i] for i in order]
        return [self._encoded(rows[i : i + self.batch]) for i in range(0, len(rows), self.batch)]

    def pairs(self) -> dict[str, Any]:
        """None: prompts have no counterparts."""
        return {}

    def calibration(self) -> dict[str, Any]:
        """Training batches and their loss."""
        batches = self.batches(0)[:CALIBRATION]
        inputs = [
            {name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches
        ]

        def loss(output: Any, batch: Any) -> Tensor:
            logits = output.logits[:, :-1].float().transpose(1, 2)  # (n, vocabulary, tokens - 1)
            return F.cross_entropy(logits, batch[1]["labels"][:, 1:], ignore_index=IGNORED)

        return {"calibration_data": list(zip(inputs, batches, strict=True)), "loss_fn": loss}

    def _encoded(self, rows: Sequence[Pair]) -> Batch:
        return {k: t.to(self.device) for k, t in masked(self.tokenizer, rows).items()}

    def _token_losses(self, params: Params, batch: Batch) -> Tensor:
        """Cross-entropy of every token from the second on, (n, tokens - 1); 0 where the label is
        ignored.
        """
        output = ll.apply(
            self.model,
            params,
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
        )
        logits = output.logits[:, :-1].float()  # (n, tokens - 1, vocabulary)
        return F.cross_entropy(
            logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=IGNORED, reduction="none"
        )

    def loss(self, params: Params, head: dict[str, Tensor], batch: Batch) -> Tensor:
        """Mean cross-entropy of the response tokens."""
        return self._token_losses(params, batch).sum() / (batch["labels"][:, 1:] != IGNORED).sum()

    @torch.no_grad()
    def evaluate(self, params: Params, head: dict[str, Tensor]) -> Evaluation:
        """The part of the held-out prompts whose generated answer ends in the right number; outputs
        are the responses' mean losses.
        """
        texts, losses = [], []
        bound = ll.bind(self.model, params)
        for i in range(0, len(self.held_out), EVAL_BATCH):
            rows = self.held_out[i : i + EVAL_BATCH]
            texts += self._generated(bound, [prompt for prompt, _ in rows])
            batch = self._encoded(rows)
            counts = (batch["labels"][:, 1:] != IGNORED).sum(1)
            losses.append(self._token_losses(params, batch).sum(1) / counts)
        right = [
            _same(final_number(text), final_number(response))
            for text, (_, response) in zip(texts, self.held_out, strict=True)
        ]
        return Evaluation(sum(right) / len(right), torch.cat(losses).cpu(), texts)

    def _generated(self, bound: Any, prompts: list[str]) -> list[str]:
        """Greedy continuations."""
        inputs = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(
            self.device
        )
        limits = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": False,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        tokens = bound.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **limits
        )
        return self.tokenizer.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def fresh(self) -> CausalTask:
        """The same pairs around a model loaded again."""
        return dataclasses.replace(self, model=_model(self.source, self.device))


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
    """The task, with the model of a folder in eval mode and in the dtype of its files; its
    parameters keep requires_grad.

    Args:
        source: folder of a causal language model's files.
        file: JSON lines to learn.
        held_out: JSON lines for the score; without it the last fifth of `file`, shuffled by the
            seed, is held out.
        batch: pairs per step.
        seed: of the split and the order.
        device: where the model goes.
        max_tokens: longer pairs are left out.
        max_new_tokens: how far generation may go.
        limit: take that many pairs of each file only.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.eos_token_id is None:
        raise SystemExit(
            f"the tokenizer of {source} has no end token, which a response must learn to end with"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = _short(tokenizer, pairs(file), max_tokens)
    rows = [
        rows[i]
        for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    ][:limit]
    cut = len(rows) if held_out else round((1.0 - HELD_OUT) * len(rows))
    test = pairs(held_out)[:limit] if held_out else rows[cut:]
    if not rows[:cut] or not test:
        raise SystemExit(f"{file}: {cut} pairs to learn and {len(test)} held out are too few")
    title = f"Responses to prompts: {cut:,} pairs to learn, {len(test):,} held out"
    return CausalTask(
        _model(source, device),
        tokenizer,
        source,
        rows[:cut],
        test,
        batch,
        seed,
        device,
        max_new_tokens,
        title,
    )


def _model(source: Path, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval().to(device)


# --------------------------------------------------------------------------------------------- data
def pairs(file: Path) -> list[Pair]:
    """The (prompt, response) pairs of a file of JSON lines.

    Raises:
        SystemExit: a line isn't an object with one of the known pairs of fields; with its number.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SystemExit(f"{file}, line {number}: not JSON: {error}") from None
        fields = next(
            (
                f
                for f in FIELDS
                if isinstance(row, dict) and all(isinstance(row.get(name), str) for name in f)
            ),
            None,
        )
        if fields is None:
            raise SystemExit(
                f"{file}, line {number}: expected an object with the texts "
                f"{' or '.join(' and '.join(f) for f in FIELDS)}"
            )
        prompt, response = (row[name] for name in fields)
        found.append(
            (prompt, response) if fields == FIELDS[0] else (TEMPLATE.format(prompt), " " + response)
        )
    return found


def _short(tokenizer: Any, rows: list[Pair], most: int) -> list[Pair]:
    """The pairs of at most `most` tokens."""
    return [
        (p, r)
        for p, r in rows
        if len(tokenizer(p)["input_ids"]) + len(_ids(tokenizer, r)) + 1 <= most
    ]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def masked(tokenizer: Any, rows: Sequence[Pair]) -> Batch:
    """input_ids, attention_mask and labels, (n, tokens) each: prompt, response, end token, padding
    on the right.

    The labels are the tokens of the response and the end token; IGNORED on the prompt and the
    padding.
    """
    encoded = [
        (list(tokenizer(prompt)["input_ids"]), [*_ids(tokenizer, response), tokenizer.eos_token_id])
        for prompt, response in rows
    ]
    longest = max(len(p) + len(r) for p, r in encoded)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, response in encoded:
        rest = longest - len(prompt) - len(response)
        batch["input_ids"].append([*prompt, *response, *[tokenizer.pad_token_id] * rest])
        batch["attention_mask"].append([1] * (longest - rest) + [0] * rest)
        batch["labels"].append([IGNORED] * len(prompt) + response + [IGNORED] * rest)
    return {name: torch.tensor(ids) for name, ids in batch.items()}


# -------------------------------------------------------------------------------------------- score
def final_number(text: str) -> Decimal | None:
    """The number a text ends with: the first after "####" or "The answer is:", else the last of
        all; None where there is none.

    >>> final_number("2 + 2 = 4, so 4 * 300. #### 1,200")
    Decimal('1200')
    """
    for marker in MARKERS:
        _, found, tail = text.partition(marker)
        if found:
            numbers = NUMBER.findall(tail)
            return _decimal(numbers[0]) if numbers else None
    numbers = NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def _same(found: Decimal | None, asked: Decimal | None) -> bool:
    return found is not None and found == asked
