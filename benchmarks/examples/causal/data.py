"""Rows to learn from: prompts with responses, or chats, in JSON lines or in one JSON array."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Example", "data_hash", "read", "shuffled", "split"]

TEMPLATE = "Question: {} Think step by step.\nAnswer:"
FIELDS = (
    ("prompt", "response"),
    ("query", "response"),
    ("question", "answer"),
    ("instruction", "output"),
)
"""Names of two texts. All but the first are put in TEMPLATE; "input" may stand by "instruction"."""


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


class Example(NamedTuple):
    """What is given, and what is to be learned.

    Attributes:
        prompt: a text, or the turns of a chat before the last.
        response: the text to learn.
    """

    prompt: str | tuple[Message, ...]
    response: str


def read(file: Path, limit: int | None = None) -> list[Example]:
    """The examples of a file, at most `limit` of them.

    Raises:
        SystemExit: the file isn't JSON, or a row is none of the known forms; with its number.
    """
    found = [_example(row, where) for where, row in _rows(file)][:limit]
    if not found:
        raise SystemExit(f"{file}: expected rows of prompts and responses, found none")
    return found


def _rows(file: Path) -> list[tuple[str, Any]]:
    """(where it stands, the row) for each row."""
    text = file.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            return [(f"{file}, row {i}", row) for i, row in enumerate(json.loads(text), 1)]
        except ValueError as error:
            raise SystemExit(f"{file}: not JSON: {error}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((f"{file}, line {number}", json.loads(line)))
            except ValueError as error:
                raise SystemExit(f"{file}, line {number}: not JSON: {error}") from None
    return rows


def _example(row: Any, where: str) -> Example:
    if isinstance(row, dict) and "messages" in row:
        return _chat(row["messages"], where)
    for fields in FIELDS:
        if isinstance(row, dict) and all(isinstance(row.get(name), str) for name in fields):
            prompt, response = (row[name] for name in fields)
            if fields == FIELDS[0]:
                return Example(prompt, response)
            if row.get("input"):
                prompt = f"{prompt}\n{row['input']}"
            return Example(TEMPLATE.format(prompt), " " + response)
    raise SystemExit(
        f"{where}: expected an object with messages, or with the texts "
        f"{', or '.join(' and '.join(fields) for fields in FIELDS)}"
    )


def _chat(turns: Any, where: str) -> Example:
    """The last turn is what is learned."""
    whole = isinstance(turns, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in turns
    )
    if not whole or len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise SystemExit(
            f"{where}: messages: expected two or more objects with the texts role and content, the "
            f"last by the assistant"
        )
    told = tuple(Message(turn["role"], turn["content"]) for turn in turns)
    return Example(told[:-1], told[-1].content)


# --------------------------------------------------------------------------------- order and parts
def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below `count` in the seed's order."""
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randperm(count, generator=generator)]


def split(
    examples: Sequence[Example], part: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(to learn, held out): `part` of the examples is held out, chosen by the seed."""
    order = shuffled(len(examples), seed)
    cut = len(order) - max(1, round(part * len(order)))
    return [examples[i] for i in order[:cut]], [examples[i] for i in order[cut:]]


def data_hash(*parts: Sequence[Example]) -> str:
    """12 hexadecimal digits that tell what was learned and scored, in order."""
    found = hashlib.sha256()
    for part in parts:
        found.update(json.dumps(part).encode())
    return found.hexdigest()[:12]
