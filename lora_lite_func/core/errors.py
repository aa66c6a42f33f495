"""What can go wrong, as a user sees it: one base class, its children, each also a builtin."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "CheckpointError",
    "ConfigError",
    "LoraLiteError",
    "StructureError",
    "TargetError",
    "UnsupportedError",
    "nearest",
    "printable",
    "short_repr",
]


class LoraLiteError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(LoraLiteError, ValueError):
    """A config says something that can't be meant: an unknown field, a wrong type, a value out of
    range.
    """


class TargetError(LoraLiteError, ValueError):
    """A pattern, role or layer index of a config selects nothing."""


class StructureError(LoraLiteError, ValueError):
    """An adapter doesn't fit where it is put: another model, another adapter, a missing or
    mis-shaped tensor.
    """


class CheckpointError(LoraLiteError, ValueError):
    """A file can't be written or read as an adapter."""


class UnsupportedError(LoraLiteError, TypeError):
    """A method can't do what is asked on this layer or this kind of model."""


def nearest(word: str, known: Iterable[str], *, first: int = 3) -> str:
    """A hint for a message: the closest known words, or else the first few.

    >>> nearest("q_porj", ["q_proj", "k_proj"])
    "did you mean 'q_proj'?"
    """
    known = list(known)
    # bounded, since a file may ask
    close = difflib.get_close_matches(word[:_LONGEST], known[:10_000], n=1, cutoff=0.6)
    if close:
        return f"did you mean {short_repr(close[0])}?"
    if not known:
        return "there are none."
    more = f" (and {len(known) - first} more)" if len(known) > first else ""
    return f"there are: {', '.join(map(short_repr, known[:first]))}{more}."


def short_repr(value: Any) -> str:
    """A value for a message: its repr, cut where it is long.

    >>> short_repr("q_proj")
    "'q_proj'"
    """
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def printable(text: str) -> str:
    r"""A name as it may be printed: characters that a terminal would act on, or that make a line
    look like two, are escaped.

    >>> printable("up\x1b[2J")
    'up\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_LONGEST = 200  # characters of a value that a message repeats
