"""Patterns in the configs of others: what they can match, read without running them."""

from __future__ import annotations

import re

__all__ = ["alternatives", "bounded", "literal"]

# How many unbounded quantifiers an alternative may have: more can take hours on a long path.
_QUANTIFIED = 4

_LONGEST = 5_000  # the most characters that a pattern may have


def literal(key: str) -> bool:
    """Tell whether a key has none of a pattern's special characters, dots aside."""
    return re.fullmatch(r"[\w.]+", key) is not None


def bounded(pattern: str) -> bool:
    """Tell whether matching takes time polynomial in the path, of a low degree. That is so where
    each alternative has few unbounded quantifiers, and none of them inside another's.
    """
    if len(pattern) > _LONGEST:
        return False
    # An escape or a set matches one character, so any one character can stand for it.
    text = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "a", pattern, flags=re.DOTALL)
    # What a group is called, or whether it captures, has no part in how long matching takes.
    text = re.sub(r"\(\?(?:P<\w+>|<?[=!]|:)", "(", text)
    if "(?" in text or any(
        len(re.findall(r"[*+]|\{", part)) > _QUANTIFIED for part in alternatives(text)
    ):
        return False
    # Innermost groups first: a repeated group with a quantifier inside can take exponential time.
    while True:
        inner = re.search(r"\(([^()]*)\)([*+{]?)", text)
        if inner is None:
            return True
        if inner[2] and re.search(r"[*+{]|Q", inner[1]):
            return False
        mark = "Q" if inner[2] or re.search(r"[*+{Q]", inner[1]) else "a"
        text = text[: inner.start()] + mark + text[inner.end() :]


def alternatives(text: str) -> list[str]:
    """Return the parts of a pattern between the bars that stand in no group."""
    depth, parts = 0, [""]
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
