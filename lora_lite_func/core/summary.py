"""How an adapter prints: a row per group of like sites, layer numbers folded into ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .errors import printable
from .layout import LeafSpec
from .site import Site

__all__ = ["render"]

_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,8})(?![^.])")
"""A whole part of a path that int() and then str() turn into itself again."""


def render(
    variant: str,
    sites: Mapping[str, Site],
    data: Mapping[str, Mapping[str, Any]],
    specs: Mapping[str, Mapping[str, LeafSpec]],
) -> str:
    """The table as text: path, in -> out, tensors with shape and dtype, a star at frozen ones; what
    sites share comes last.
    """
    groups: dict[tuple[tuple[str, ...], str, str], list[tuple[int, ...]]] = {}
    total = learned = 0
    for path, held in data.items():
        cells = []
        for name, leaf in held.items():
            cells.append(f"{name}{'' if specs[path][name].trainable else '*'} {_leaf(leaf)}")
            count = leaf.numel() if isinstance(leaf, Tensor) else 0
            total += count
            learned += count if specs[path][name].trainable else 0
        numbers = tuple(int(n) for n in _NUMBER.findall(path))
        dims = _dims(sites[path]) if path in sites else "shared"
        row = tuple(_NUMBER.split(path)), dims, "  ".join(cells)
        groups.setdefault(row, []).append(numbers)
    rows = [
        (printable(_fold(texts, numbers)) or '""', dims, cells)
        for (texts, dims, cells), numbers in groups.items()
    ]
    head = f"Adapter({variant}: {len(sites)} sites, {learned:,} trainable parameters"
    head += f", {total - learned:,} frozen*)" if total != learned else ")"
    wide = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    return "\n".join([head, *(f"  {p:<{wide[0]}}  {d:<{wide[1]}}  {c}" for p, d, c in rows)])


def _dims(site: Site) -> str:
    return (
        f"{site.num_experts} x {site.d_in} -> {site.d_out}"
        if site.num_experts
        else f"{site.d_in} -> {site.d_out}"
    )


def _leaf(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    return f"({', '.join(map(str, leaf.shape))}) {str(leaf.dtype).removeprefix('torch.')}"


def _fold(texts: tuple[str, ...], numbers: list[tuple[int, ...]]) -> str:
    """("layers.", ".q") with [(0,), (1,), (2,)] -> "layers.{0-2}.q"; each number in a path has a
    range of its own.
    """
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    ranges = ["{" + _ranges(c) + "}" if len(c) > 1 else str(c[0]) for c in columns]
    return "".join(text + number for text, number in zip(texts, [*ranges, ""], strict=True))


def _ranges(values: list[int]) -> str:
    parts: list[list[int]] = []
    for v in values:
        if parts and parts[-1][-1] + 1 == v:
            parts[-1].append(v)
        else:
            parts.append([v])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
