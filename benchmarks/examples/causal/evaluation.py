"""How good an adapter is on held-out examples: mean loss, and what it generates, scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lora_lite_func as ll

from .data import Example
from .encoding import Encoded, encode, padded, prompt_text
from .losses import held_out_losses
from .scoring import Score, generate, is_right

__all__ = ["Evaluator", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What held-out examples gave.

    Attributes:
        loss: mean over the examples of the mean loss of their learned tokens.
        score: the part that was answered rightly.
        texts: what was generated.
        right: whether each of them is right.
        losses: the loss of each.
    """

    loss: float
    score: float
    texts: list[str]
    right: list[bool]
    losses: list[float]


@dataclass(frozen=True)
class Evaluator:
    """Held-out examples, and how they are scored.

    Attributes:
        model: the base.
        tokenizer: the model's.
        score: "number" or "text".
        chat: whether prompts are put in the chat template.
        batch: examples at once.
        most: new tokens of a generated text.
        device: where the model is.
    """

    model: Any
    tokenizer: Any
    score: Score
    chat: bool
    batch: int
    most: int
    device: str

    def losses(self, params: Any, examples: Sequence[Example]) -> list[float]:
        """The mean loss of each example's learned tokens."""
        rows = [encode(self.tokenizer, example, self.chat) for example in examples]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        found = held_out_losses(self.model, params, self._batches([rows[i] for i in order]))
        losses = [0.0] * len(rows)
        for i, loss in zip(order, found.tolist(), strict=True):
            losses[i] = loss
        return losses

    def _batches(self, rows: Sequence[Encoded]) -> list[Any]:
        made = []
        for i in range(0, len(rows), self.batch):
            batch = padded(rows[i : i + self.batch], self.tokenizer.pad_token_id)
            made.append({name: t.to(self.device) for name, t in batch.items()})
        return made

    def texts(self, params: Any, examples: Sequence[Example]) -> list[str]:
        """What the model generates with the adapter; () is the bare base."""
        self.model.eval()
        return generate(
            ll.prepared(self.model, params),
            self.tokenizer,
            [prompt_text(self.tokenizer, example, self.chat) for example in examples],
            batch=self.batch,
            most=self.most,
            special=[self.chat or not isinstance(example.prompt, str) for example in examples],
            device=self.device,
        )

    def __call__(self, params: Any, examples: Sequence[Example]) -> Outcome:
        """Loss and score on these examples."""
        self.model.eval()
        losses = self.losses(params, examples)
        texts = self.texts(params, examples)
        right = is_right(self.score, texts, [example.response for example in examples])
        mean = sum(losses) / len(losses)
        return Outcome(mean, sum(right) / len(right), texts, right, losses)
