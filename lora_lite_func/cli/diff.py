"""How two adapters differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.config import to_dict
from ..core.site import Site

__all__ = ["difference"]


# -------------------------------------------------------------------------------------- differences
def difference(a: Any, b: Any) -> tuple[list[str], dict[str, Any]]:
    """(lines for people, JSON) of how two differ; no lines if they don't."""
    parts_a, parts_b = _named(a), _named(b)
    lines: list[str] = []
    data: dict[str, Any] = {}
    for name in [*parts_a, *(n for n in parts_b if n not in parts_a)]:
        if name not in parts_a or name not in parts_b:
            lines.append(
                f"part {name}: in {'the first' if name in parts_a else 'the second'} alone"
            )
            data[name] = {"only": "a" if name in parts_a else "b"}
            continue
        found = _differing(parts_a[name], parts_b[name])
        if found:
            data[name] = found
            lines += [f"{name + ': ' if name else ''}{line}" for line in _lines(found)]
    return lines, data


def _named(params: Any) -> dict[str, Adapter]:
    if isinstance(params, Adapter):
        return {"": params}
    return {
        str(k): v for k, v in (params.items() if isinstance(params, Mapping) else enumerate(params))
    }


def _differing(a: Adapter, b: Adapter) -> dict[str, Any]:
    found: dict[str, Any] = {}
    one, two = (_settings(x) for x in (a, b))
    settings = {k: [one.get(k), two.get(k)] for k in [*one, *two] if one.get(k) != two.get(k)}
    if settings:
        found["settings"] = settings
    for key, first, second in (("only_a", a, b), ("only_b", b, a)):
        alone = [path for path in first if path not in second]
        if alone:
            found[key] = alone
    tensors: dict[str, Any] = {}
    for path in a:
        if path in b:
            if _facts(a.sites[path]) != _facts(b.sites[path]):
                tensors[path] = f"{_facts(a.sites[path])} / {_facts(b.sites[path])}"
            for name in sorted({*a[path], *b[path]}):
                apart = _apart(a[path].get(name), b[path].get(name))
                if apart is not None:
                    tensors[f"{path}.{name}"] = apart
    return found | ({"tensors": tensors} if tensors else {})


def _settings(adapter: Adapter) -> dict[str, Any]:
    """The method and what its adapters compute with; not what only records where one came from, nor
    sizes, which sites say.
    """
    cfg = adapter.config
    recorded = {f.name for f in dataclasses.fields(cfg) if not f.compare}
    own = {k: v for k, v in to_dict(cfg).items() if k not in recorded}
    return {"method": adapter.layout.variant.name} | {
        k: v for k, v in own.items() if k not in ("r", "alpha", "rank_pattern", "alpha_pattern")
    }


def _facts(site: Site) -> str:
    return f"{site.kind} {site.d_in} -> {site.d_out}, r={site.r}, alpha={site.alpha:g}"


def _apart(t: Tensor | None, u: Tensor | None) -> Any:
    if t is None or u is None:
        return "in one alone"
    if t.shape != u.shape or t.dtype != u.dtype:
        return f"{tuple(t.shape)} {t.dtype} / {tuple(u.shape)} {u.dtype}"
    if torch.equal(t, u):
        return None
    gap = (t.double() - u.double()).norm()
    return {
        "max": float((t.double() - u.double()).abs().max()),
        "relative": float(gap / t.double().norm().clamp_min(1e-300)),
    }


def _lines(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{k}: {a!r} / {b!r}" for k, (a, b) in found.get("settings", {}).items()]
    for key, what in (("only_a", "first"), ("only_b", "second")):
        lines += [f"site {path}: in the {what} alone" for path in found.get(key, ())]
    for name, apart in found.get("tensors", {}).items():
        lines.append(
            f"{name}: "
            f"{apart if isinstance(apart, str) else 'max {max:.3g}, relative {relative:.3g}'.format(**apart)}"
        )
    return lines
