"""diff: how two adapters differ, as text and as data."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter, member
from ..core.config import to_dict
from ..core.errors import printable
from ..core.site import Site
from .opening import Answer, opened, parts_of

__all__ = ["EXAMPLES", "HELP", "add_arguments", "difference", "run"]

HELP = "how two adapters differ; exit code 1 if they do"
EXAMPLES = """\
python -m lora_lite_func diff a.safetensors b.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("a", help="a file of ll.save, or a PEFT folder")
    parser.add_argument("b", help="another")
    parser.add_argument("--model", metavar="FOLDER", help="the base, as in inspect")


def run(given: argparse.Namespace) -> Answer:
    """Tell how two adapters differ. The exit code is 0 where they don't."""
    lines, data = difference(opened(given.a, given.model), opened(given.b, given.model))
    return "\n".join(map(printable, lines)) or "no difference", data, int(bool(lines))


def difference(a: Any, b: Any) -> tuple[list[str], dict[str, Any]]:
    """Return how two adapters differ, as (lines for people, JSON). There are no lines if they
    don't.

    Several adapters are compared part by part, and members of stacks by their names if both have
    names. The container they are in and their order count too.
    """
    lines: list[str] = []
    data: dict[str, Any] = {}
    if _container(a) != _container(b):
        data["container"] = [_container(a), _container(b)]
        lines.append(f"{_container(a)} / {_container(b)}")
    parts_a, parts_b = parts_of(a), parts_of(b)
    for name in [*parts_a, *(n for n in parts_b if n not in parts_a)]:
        if name not in parts_a or name not in parts_b:
            which = "first" if name in parts_a else "second"
            lines.append(f"part {name}: in the {which} alone")
            data[name] = {"only": "a" if name in parts_a else "b"}
            continue
        found = _differing(parts_a[name], parts_b[name])
        if found:
            data[name] = found
            lines += [f"{name + ': ' if name else ''}{line}" for line in _lines(found)]
    return lines, data


def _container(params: Any) -> str:
    if isinstance(params, Adapter):
        return "an adapter"
    return f"a {'dict' if isinstance(params, Mapping) else type(params).__name__} of adapters"


def _differing(a: Adapter, b: Adapter) -> dict[str, Any]:
    names_a, names_b = _names(a), _names(b)
    if names_a is None or names_b is None:
        found = _one_differing(a, b)
        if names_a != names_b:
            found["names"] = [names_a, names_b]
        return found
    found = {} if names_a == names_b else {"names": [names_a, names_b]}
    members: dict[str, Any] = {}
    for name in (n for n in names_a if n in names_b):
        one, two = member(a, names_a.index(name)), member(b, names_b.index(name))
        apart = _one_differing(one, two)
        if apart:
            members[name] = apart
    return found | ({"members": members} if members else {})


def _names(adapter: Adapter) -> list[str] | None:
    """Return a stack's names, or None where it has none."""
    labels: Sequence[str] | None = getattr(adapter.layout, "labels", None)
    return None if labels is None else list(labels)


def _one_differing(a: Adapter, b: Adapter) -> dict[str, Any]:
    found: dict[str, Any] = {}
    one, two = (_settings(x) for x in (a, b))
    settings = {k: [one.get(k), two.get(k)] for k in [*one, *two] if one.get(k) != two.get(k)}
    if settings:
        found["settings"] = settings
    for key, first, second in (("only_a", a, b), ("only_b", b, a)):
        alone = [path for path in first if path not in second.sites]
        if alone:
            found[key] = alone
    tensors: dict[str, Any] = {}
    for path in a.layout.names:
        if path in b.layout.names:
            if path in a.sites and _facts(a.sites[path]) != _facts(b.sites[path]):
                tensors[path] = f"{_facts(a.sites[path])} / {_facts(b.sites[path])}"
            for name in sorted({*a.layout.names[path], *b.layout.names[path]}):
                apart = _apart(a[path].get(name), b[path].get(name))
                if apart is not None:
                    tensors[f"{path}.{name}"] = apart
    return found | ({"tensors": tensors} if tensors else {})


def _settings(adapter: Adapter) -> dict[str, Any]:
    """Return the method and the settings that its adapters compute with. Settings that only record
    where an adapter came from are left out, and so are sizes, which the sites say.
    """
    cfg = adapter.config
    recorded = {f.name for f in dataclasses.fields(cfg) if not f.compare}
    recorded |= {"r", "alpha", "rank_pattern", "alpha_pattern"}
    own = {k: v for k, v in to_dict(cfg).items() if k not in recorded}
    return {"method": adapter.layout.variant.name} | own


def _facts(site: Site) -> str:
    return f"{site.kind} {site.d_in} -> {site.d_out}, r={site.r}, alpha={site.alpha:g}"


def _apart(t: Tensor | None, u: Tensor | None) -> Any:
    if t is None or u is None:
        return "in one alone"
    if t.shape != u.shape or t.dtype != u.dtype:
        return f"{tuple(t.shape)} {t.dtype} / {tuple(u.shape)} {u.dtype}"
    same = (t == u) | (t.isnan() & u.isnan())
    if same.all():
        return None
    gap = torch.where(same, 0.0, t.double() - u.double())
    return {
        "max": float(gap.abs().max()),
        "relative": float(gap.norm() / t.double().norm().clamp_min(1e-300)),
    }


def _lines(found: Mapping[str, Any]) -> list[str]:
    lines = []
    if "names" in found:
        one, two = (", ".join(names or ["no names"]) for names in found["names"])
        lines.append(f"members' names: {one} / {two}")
    for name, apart in found.get("members", {}).items():
        lines += [f"member {name}: {line}" for line in _lines(apart)]
    lines += [f"{k}: {a!r} / {b!r}" for k, (a, b) in found.get("settings", {}).items()]
    for key, what in (("only_a", "first"), ("only_b", "second")):
        lines += [f"site {path}: in the {what} alone" for path in found.get(key, ())]
    for name, apart in found.get("tensors", {}).items():
        if not isinstance(apart, str):
            apart = f"max {apart['max']:.3g}, relative {apart['relative']:.3g}"
        lines.append(f"{name}: {apart}")
    return lines
