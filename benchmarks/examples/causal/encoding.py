"""From examples to batches of tokens: chat templates, what is too long, padding, packing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..training import Batch
from .data import Example, Message

__all__ = [
    "IGNORED",
    "Encoded",
    "TooLong",
    "encode",
    "kept",
    "packed",
    "packs",
    "padded",
    "prompt_text",
]

IGNORED = -100
"""The label that F.cross_entropy leaves out."""
WINDOW = 512
"""So many examples are packed together; the order within the epoch changes no further than that."""

TooLong = Literal["drop", "truncate"]


class Encoded(NamedTuple):
    """Tokens of prompt, response and end, and where the response starts."""

    ids: list[int]
    start: int


def prompt_text(tokenizer: Any, example: Example, chat: bool = False) -> str:
    """The prompt as the model reads it, in its chat template if it is a chat, or `chat` says so."""
    if isinstance(example.prompt, str) and not chat:
        return example.prompt
    return _templated(tokenizer, _turns(example), True)


def _turns(example: Example) -> tuple[Message, ...]:
    if isinstance(example.prompt, str):
        return (Message("user", example.prompt.strip()),)
    return example.prompt


def _templated(tokenizer: Any, turns: Sequence[Message], prompt: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise SystemExit(
            "the tokenizer has no chat template, which messages (and --chat) need; give prompt and "
            "response instead"
        )
    messages = [turn._asdict() for turn in turns]
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
    )
    return text


def encode(tokenizer: Any, example: Example, chat: bool = False) -> Encoded:
    """Tokens of an example. A template that has an end of its own gets no second one.

    Raises:
        SystemExit: the chat template writes something else before the response than it does in
            front of a response to generate.
    """
    prompt = prompt_text(tokenizer, example, chat)
    if isinstance(example.prompt, str) and not chat:
        start = list(tokenizer(prompt)["input_ids"])
        rest = _ids(tokenizer, example.response)
    else:
        turns = (*_turns(example), Message("assistant", example.response.strip()))
        whole = _templated(tokenizer, turns, False)
        if not whole.startswith(prompt):
            raise SystemExit(
                "the chat template writes a response otherwise than it asks for one; give prompt "
                "and response instead of messages"
            )
        start, rest = _ids(tokenizer, prompt), _ids(tokenizer, whole[len(prompt) :].rstrip("\n"))
    if not rest or rest[-1] != tokenizer.eos_token_id:
        rest = [*rest, tokenizer.eos_token_id]
    return Encoded(start + rest, len(start))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def kept(rows: Sequence[Encoded], most: int, too_long: TooLong) -> tuple[list[Encoded], str]:
    """The rows of at most `most` tokens, and what was done to the others, in words.

    "truncate" cuts the end of a response; a prompt that leaves no token of it is dropped.
    """
    found, cut, dropped = [], 0, 0
    for row in rows:
        if len(row.ids) <= most:
            found.append(row)
        elif too_long == "truncate" and row.start < most:
            found.append(Encoded(row.ids[:most], row.start))
            cut += 1
        else:
            dropped += 1
    said = [f"{cut} responses cut"] * bool(cut) + [f"{dropped} dropped"] * bool(dropped)
    return found, f"{' and '.join(said)} (longer than {most} tokens)" if said else ""


# ------------------------------------------------------------------------------------------ batches
def padded(rows: Sequence[Encoded], pad: int) -> Batch:
    """input_ids, attention_mask and labels, (n, tokens) each; padding on the right.

    The labels are the tokens of the response and the end token; IGNORED on prompt and padding.
    """
    longest = max(len(row.ids) for row in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, start in rows:
        rest = longest - len(ids)
        columns["input_ids"].append(ids + [pad] * rest)
        columns["attention_mask"].append([1] * len(ids) + [0] * rest)
        columns["labels"].append([IGNORED] * start + ids[start:] + [IGNORED] * rest)
    return _tensors(columns)


def packs(rows: Sequence[Encoded], width: int) -> list[list[Encoded]]:
    """The rows in groups of at most `width` tokens: within each WINDOW the longest first, each in
    the first group that has room.
    """
    made: list[list[Encoded]] = []
    for i in range(0, len(rows), WINDOW):
        groups: list[list[Encoded]] = []
        left: list[int] = []
        for row in sorted(rows[i : i + WINDOW], key=lambda row: -len(row.ids)):
            size = len(row.ids)
            fits = next((j for j, room in enumerate(left) if room >= size), None)
            if fits is None:
                fits = len(groups)
                groups.append([])
                left.append(width)
            groups[fits].append(row)
            left[fits] -= size
        made += groups
    return made


def packed(groups: Sequence[Sequence[Encoded]], pad: int) -> Batch:
    """input_ids, position_ids and labels, (n, tokens) each: a group's examples one behind the
    other. Positions start again at each, by which a model's attention keeps them apart.
    """
    longest = max(sum(len(row.ids) for row in group) for group in groups)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": [], "labels": []}
    for group in groups:
        ids: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        for row in group:
            start = max(1, row.start)  # the first token follows nothing, or another example
            ids += row.ids
            positions += range(len(row.ids))
            labels += [IGNORED] * start + row.ids[start:]
        rest = longest - len(ids)
        columns["input_ids"].append(ids + [pad] * rest)
        columns["position_ids"].append(positions + list(range(rest)))
        columns["labels"].append(labels + [IGNORED] * rest)
    return _tensors(columns)


def _tensors(columns: dict[str, list[list[int]]]) -> dict[str, Tensor]:
    return {name: torch.tensor(rows) for name, rows in columns.items()}
