"""What the texts of some options mean: parts, limits, indices, lists to combine."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["FILES", "NUMBERS", "SWEPT", "grid", "layers", "limits", "valid_of"]

NUMBERS = "numbers"
"""The data that needs no file."""
FILES = ("train", "valid", "test")
SWEPT = ("lr", "r", "alpha", "seed")
"""What --sweep takes beside fields of the method's config."""


def valid_of(args: argparse.Namespace) -> Path | float:
    """The file of --valid, or the part of --data."""
    if args.valid is None:
        return 0.1
    if Path(args.valid).is_file():
        return Path(args.valid)
    try:
        part = float(args.valid)
    except ValueError:
        part = 0.0
    if not 0.0 < part < 1.0:
        raise ValueError(
            f"--valid: expected a file or a part between 0 and 1, found {args.valid!r}"
        )
    return part


def limits(args: argparse.Namespace) -> dict[str, int | None]:
    """{file: how many examples of it}."""
    found: dict[str, int | None] = dict.fromkeys(FILES)
    for text in args.limit:
        name, equals, number = text.rpartition("=")
        names = [name] if equals else FILES
        if not number.isdecimal() or int(number) < 1 or (equals and name not in FILES):
            raise ValueError(f"--limit: expected N or train=N, valid=N, test=N, found {text!r}")
        found |= dict.fromkeys(names, int(number))
    return found


def layers(args: argparse.Namespace) -> tuple[int, ...] | None:
    """The indices of --layers."""
    if args.layers in (None, "all"):
        return None
    found: list[int] = []
    for part in args.layers.split(","):
        first, dash, last = (
            part.strip().partition("-") if part.strip()[:1] != "-" else (part, "", "")
        )
        try:
            found += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError:
            raise ValueError(f"--layers: expected 0,2,8-11,-1, found {args.layers!r}") from None
    return tuple(found)


def grid(args: argparse.Namespace) -> list[dict[str, str]]:
    """Every combination of --sweep's lists, {name: value as text}; without it there is none."""
    combinations: list[dict[str, str]] = [{}]
    for text in args.sweep or ():
        name, equals, values = text.partition("=")
        if not equals or not all(values.split(",")):
            raise ValueError(f"--sweep: expected lists such as lr=1e-4,3e-4, found {text!r}")
        if name in combinations[0]:
            raise ValueError(f"--sweep: two lists of {name}")
        combinations = [{**c, name: value} for c in combinations for value in values.split(",")]
    return combinations if args.sweep else []
