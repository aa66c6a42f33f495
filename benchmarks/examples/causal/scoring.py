"""Scores of what a model generates: the number that a text ends with, or the whole text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, Literal

import torch

__all__ = ["SCORES", "Score", "final_number", "generate", "is_right"]

MARKER = re.compile(r"####|The answer is:")
NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")

Score = Literal["number", "text"]


def final_number(text: str) -> Decimal | None:
    """The last number after the last "####" or "The answer is:", or in all of a text without them;
    None where there is none.

    >>> final_number("2 + 2 = 4, so 4 * 300. #### 1,200")
    Decimal('1200')
    """
    numbers = NUMBER.findall(MARKER.split(text)[-1])
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _same_number(found: str, asked: str) -> bool:
    number = final_number(found)
    return number is not None and number == final_number(asked)


def _same_text(found: str, asked: str) -> bool:
    return found.split() == asked.split()


SCORES: dict[Score, Callable[[str, str], bool]] = {"number": _same_number, "text": _same_text}
"""Whether a generated text (first) gives what was asked for."""


def is_right(score: Score, texts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    """Whether each generated text gives its response's answer."""
    return [SCORES[score](a, b) for a, b in zip(texts, responses, strict=True)]


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch: int,
    most: int,
    special: Sequence[bool],
    device: str,
) -> list[str]:
    """Greedy continuations, in the order of the prompts.

    Args:
        model: anything with `generate`.
        tokenizer: the model's.
        prompts: texts.
        batch: how many are continued at once; prompts of like length share a batch.
        most: new tokens at most.
        special: of each prompt, whether its special tokens are in it already (a chat's are).
        device: where the model is.
    """
    ids = [
        list(tokenizer(text, add_special_tokens=not has)["input_ids"])
        for text, has in zip(prompts, special, strict=True)
    ]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts = [""] * len(ids)
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        width = max(len(ids[i]) for i in chosen)
        pads = [width - len(ids[i]) for i in chosen]
        rows = [[tokenizer.pad_token_id] * p + ids[i] for p, i in zip(pads, chosen, strict=True)]
        masks = [[0] * p + [1] * (width - p) for p in pads]
        tokens = model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(masks, device=device),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=_ends(model, tokenizer),
        )
        found = tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
        for i, text in zip(chosen, found, strict=True):
            texts[i] = text
    return texts


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Where generation stops: the token that responses are trained to end with, and the model's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    others = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *others]))
