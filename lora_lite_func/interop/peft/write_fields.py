"""Fields of adapter_config.json: the base, ranks and alphas, and what is targeted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from .codec import Codec, Written
from .keys import KeyMap

__all__ = ["about_base", "ranks_and_alphas", "targeted", "targets"]


# The layout is written for the loader of this release. Newer ones read it too.
_VERSION = "0.17.0"


def about_base(model: nn.Module | None) -> dict[str, Any]:
    """Return the fields that say which base an adapter is for, and how the file is read."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(
        model, "name_or_path", None
    )
    kind = type(model)  # PEFT's Auto classes find the base's class by it
    origin = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    fixed = {
        "auto_mapping": None if model is None else origin,
        "revision": None,
        "task_type": None,
        "inference_mode": True,
        "peft_version": _VERSION,
    }
    return fixed | {"base_model_name_or_path": name if isinstance(name, str) else None}


def ranks_and_alphas(method: Codec, made: Written, keys: KeyMap) -> dict[str, Any]:
    """Return ranks and alphas, with the commonest as the default and the others as patterns of
    whole paths.
    """
    fields: dict[str, Any] = {}
    pairs: tuple[tuple[str, str, Mapping[str, float]], ...] = (
        (method.rank, "rank_pattern", made.ranks),
        (method.alpha, "alpha_pattern", made.alphas),
    )
    for name, pattern, values in pairs:
        if values:
            every = list(values.values())
            common = max(dict.fromkeys(every), key=every.count)
            fields[name] = common
            fields[pattern] = {
                "^" + re.escape(keys.names[path]): value
                for path, value in values.items()
                if value != common
            }
    return fields


def targeted(
    made: Written, keys: KeyMap, modules: Mapping[str, Any], forward: list[str] | None
) -> dict[str, Any]:
    """Return the fields that say what is adapted."""
    names = [name for name in dict.fromkeys(keys.names.values()) if name not in keys.parameters]
    fields: dict[str, Any] = {
        "target_modules": targets(names, modules or made.tensors, forward) if names else []
    }
    if keys.parameters:
        fields["target_parameters"] = sorted(keys.parameters)
    if forward:
        fields["feedforward_modules"] = _forward(forward, fields["target_modules"])
    return fields


def targets(paths: list[str], modules: Mapping[str, Any], forward: list[str] | None = None) -> Any:
    """Return the shortest list that names these modules and no others: last names, else whole
    paths, else a pattern.

    PEFT finds IA3's feed-forward modules by any ending, so the same names must tell those apart
    too.
    """
    for names in (sorted({p.rpartition(".")[2] for p in paths}), sorted(paths)):
        if {m for m in modules if _named(m, names)} == set(paths):
            chosen = _forward(forward or [], names)
            if {p for p in paths if any(p.endswith(n) for n in chosen)} == set(forward or []):
                return names
    return rf"(?:{'|'.join(map(re.escape, sorted(paths)))})"


def _named(path: str, names: list[str]) -> bool:
    return any(path == n or path.endswith("." + n) for n in names)


def _forward(forward: list[str], targets: Any) -> Any:
    """Return IA3's feed-forward modules in the terms of the targets."""
    if isinstance(targets, str):
        return rf"(?:{'|'.join(map(re.escape, sorted(forward)))})"
    return [n for n in targets if any(_named(p, [n]) for p in forward)]
