"""The task that is there without a file: numbers written out in a language, to be given in digits.

The package num2words writes them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from .data import Example

__all__ = ["LARGEST", "numbers"]

LARGEST = 9999
PROMPT = "Question: Write {} in digits.\nAnswer:"


def numbers(language: str, sizes: Sequence[int], seed: int) -> list[list[Example]]:
    """Lists of so many examples, all of different numbers from 1 to LARGEST.

    Args:
        language: a language of num2words, such as "de".
        sizes: how many examples each list has.
        seed: of the choice.

    Raises:
        SystemExit: num2words isn't installed, doesn't know the language, or there are too few
            numbers.
    """
    try:
        from num2words import num2words
    except ImportError:
        raise SystemExit("--data numbers needs a package: pip install num2words") from None
    if sum(sizes) > LARGEST:
        raise SystemExit(f"--limit: {sum(sizes):,} numbers, but there are {LARGEST:,}")
    chosen = iter(random.Random(seed).sample(range(1, LARGEST + 1), sum(sizes)))
    try:
        return [
            [
                Example(PROMPT.format(num2words(n, lang=language)), f" {n}")
                for n in itertools.islice(chosen, size)
            ]
            for size in sizes
        ]
    except NotImplementedError:
        raise SystemExit(f"--data: num2words doesn't know the language {language!r}") from None
