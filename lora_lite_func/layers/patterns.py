"""Patterns and layer indices of a config, held against the paths of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from ..core.config import AdapterConfig
from ..core.errors import TargetError, nearest
from .kinds import KINDS, Kind, kind_of
from .roles import layer_index

__all__ = ["check_patterns", "chosen_layers", "elsewhere", "nothing_left", "words_for"]


def words_for(kinds: Iterable[Kind]) -> str:
    """The words for modules of these kinds, in messages."""
    return " or ".join(kind.words for kind in kinds) or "sites"


def check_patterns(
    what: str,
    patterns: Iterable[str],
    paths: list[str],
    words: str,
    model: nn.Module | None = None,
    kinds: Iterable[Kind] = (),
) -> None:
    """Refuse a pattern that matches no path.

    Args:
        what: the config's field.
        patterns: its regular expressions.
        paths: the candidates' paths.
        words: what they are, for the message.
        model: where else a pattern may match, for advice; None gives none.
        kinds: the kinds of the candidates.

    Raises:
        TargetError: with the nearest names, or where else it matches.
    """
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            hint = "" if model is None else elsewhere(model, [pattern], kinds)
            if not hint:
                names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
                hint = f"; {nearest(pattern, names)}"
                if not hint.startswith("; did you mean"):
                    hint = f"; first ones: {', '.join(map(repr, paths[:3]))}"
            raise TargetError(f"{what}: {pattern!r} matched none of {len(paths)} {words}{hint}")


def elsewhere(model: nn.Module, patterns: Iterable[str], kinds: Iterable[Kind]) -> str:
    """Advice: what the patterns (any path, if there are none) match among the other kinds."""
    taken = {kind.name for kind in kinds}
    patterns = list(patterns) or [""]
    counts: dict[str, int] = {}
    for path, module in model.named_modules():
        kind = kind_of(module) if any(re.search(p, path) for p in patterns) else None
        if kind is not None and kind.name not in taken:
            counts[kind.name] = counts.get(kind.name, 0) + 1
    if counts:
        found = " and ".join(f"{n} of kind {name!r}" for name, n in counts.items())
        verb = "it has" if patterns == [""] else "it matches"
        return f"; {verb} {found}: add target_kinds=({', '.join(map(repr, counts))},)"
    names = [
        name
        for name, _ in model.named_parameters()
        if patterns != [""] and any(re.search(p, name) for p in patterns)
    ]
    return f"; it matches the parameter {names[0]!r}: name it in target_parameters" if names else ""


def chosen_layers(cfg: AdapterConfig, paths: list[str], words: str) -> set[int] | None:
    """The layer indices of a config, counted from the start; None takes every layer.

    Raises:
        TargetError: an index that no path has, or no path has any.
    """
    if cfg.layers is None:
        return None
    known = sorted({i for i in map(layer_index, paths) if i is not None})
    if not known:
        none = "no linear-like layer" if words == KINDS["linear"].words else f"none of the {words}"
        raise TargetError(
            f"layers: {none} has a number in its path; first ones: "
            f"{', '.join(map(repr, paths[:3]))}"
        )
    count = known[-1] + 1
    wanted = {i + count if i < 0 else i for i in cfg.layers}
    for i in cfg.layers:
        if (i + count if i < 0 else i) not in known:
            raise TargetError(
                f"layers: index {i} matches nothing; the layers are {known[0]} to {known[-1]}"
            )
    return wanted


def nothing_left(cfg: AdapterConfig, paths: list[str], words: str) -> str:
    """The message where names, roles, layers and exclusions leave nothing."""
    asked = {
        what: getattr(cfg, what)
        for what in ("target_names", "target_roles", "layers", "exclude_names")
    }
    text = ", ".join(
        f"{k}={v!r}" for k, v in asked.items() if (v is not None if k == "layers" else v)
    )
    first = ", ".join(map(repr, paths[:3]))
    return f"none of {len(paths)} {words} is left under {text}; first ones: {first}"
