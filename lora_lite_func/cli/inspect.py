"""What an adapter is and how two differ, as data and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter
from .config import to_dict
from .peft.folder import unpack
from .spec import Site

__all__ = ["delta_norm", "describe_raw", "difference", "inspected", "table"]

_ADDITIVE = (
    *("lora", "eva", "pissa", "olora", "corda", "asvd", "lora_ga", "adalora", "delora", "vera", "loha", "lokr"),
    *("c3a", "fourierft", "gralora", "randlora", "shira"),
)
"""Methods whose update doesn't depend on the weight: its norm needs no base."""
_CHEAP = 2**24  # entries of an update that is built to be measured


def delta_norm(adapter: Adapter, path: str) -> float | None:
    """The Frobenius norm of a site's update W' - W; None where it depends on W, or is too large to build."""
    site, variant = adapter.sites[path], adapter.layout.variant
    if variant.name not in _ADDITIVE or variant.weight is None or site.stack or site.d_in * site.d_out > _CHEAP:
        return None
    held = {name: t.detach().to(torch.float32) if t.is_floating_point() else t for name, t in adapter[path].items()}
    if any(t.is_meta for t in held.values()):
        return None
    update, _ = variant.weight(adapter.config, held, site, torch.zeros(site.d_out, site.d_in), None)
    return float(update.norm())


def inspected(params: Any) -> dict[str, Any]:
    """An adapter (or several) as JSON types."""
    if isinstance(params, Adapter):
        return _one(params)
    if isinstance(params, Mapping):
        return {"parts": {name: _one(part) for name, part in params.items()}}
    return {"parts": {str(i): _one(part) for i, part in enumerate(params)}}


def _one(adapter: Adapter) -> dict[str, Any]:
    members = _members(adapter)
    rows = []
    for path, site in adapter.sites.items():
        held = adapter[path]
        row: dict[str, Any] = {"site": path, "kind": site.kind, "d_in": site.d_in, "d_out": site.d_out, "r": site.r, "alpha": site.alpha}
        row["tensors"] = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in held.items()}
        row["trainable"] = sum(t.numel() for name, t in held.items() if adapter.layout.trainable[path][name])
        row["norm"] = None if members else delta_norm(adapter, path)
        rows.append(row)
    size = sum(t.nbytes for held in adapter.values() for t in held.values())
    every = {"trainable": sum(int(row["trainable"]) for row in rows), "bytes": size}
    return {"method": adapter.layout.variant.name, "members": members, "config": to_dict(adapter.config), **every, "sites": rows}


def _members(adapter: Adapter) -> int:
    """How many a stack has; 0 for a plain adapter."""
    path, names = next(iter(adapter.layout.names.items()))
    leaf: Tensor = adapter[path][names[0]]
    return leaf.shape[0] if leaf.ndim > len(adapter.layout.expected[path][names[0]]) else 0


def table(data: Mapping[str, Any]) -> str:
    """`inspected` or `describe_raw` for people."""
    if "parts" in data:
        return "\n\n".join(f"[{name}]\n{table(part)}" for name, part in data["parts"].items())
    if "keys" in data:
        width = max(map(len, data["keys"]), default=0)
        return "\n".join([f"{data['method']} (PEFT)", *(f"  {k:<{width}}  {s} {d}" for k, (s, d) in data["keys"].items())])
    of = f" x {data['members']}" if data["members"] else ""
    head = f"{data['method']}{of}: {len(data['sites'])} sites, {data['trainable']:,} trainable parameters, {data['bytes']:,} bytes"
    said = ", ".join(f"{k}={v!r}" for k, v in data["config"].items() if not k.endswith(("_names", "_pattern", "_parameters", "_kinds")))
    width = max(len(row["site"]) for row in data["sites"])
    lines = [
        head,
        f"  {said}",
        f"  {'site':<{width}}  {'kind':<9} {'d_in':>7} {'d_out':>7} {'r':>4} {'alpha':>7} {'params':>11} {'|dW|':>9}",
    ]
    for row in data["sites"]:
        norm = "" if row["norm"] is None else f"{row['norm']:.4g}"
        numbers = f"{row['d_in']:>7} {row['d_out']:>7} {row['r']:>4} {row['alpha']:>7g} {row['trainable']:>11,} {norm:>9}"
        lines.append(f"  {row['site']:<{width}}  {row['kind']:<9} {numbers}")
    return "\n".join(lines)


def describe_raw(path: str) -> dict[str, Any]:
    """A PEFT folder as it is, where its meaning hangs on a base that isn't given."""
    says, tensors = unpack(path, None)
    keys = {key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in sorted(tensors.items())}
    return {"method": str(says.get("peft_type")), "config": dict(says), "keys": keys}


# ---------------------------------------------------------------------------------------------------------- differences
def difference(a: Any, b: Any) -> tuple[list[str], dict[str, Any]]:
    """(lines for people, JSON) of how two differ; no lines if they don't."""
    parts_a, parts_b = _named(a), _named(b)
    lines: list[str] = []
    data: dict[str, Any] = {}
    for name in [*parts_a, *(n for n in parts_b if n not in parts_a)]:
        if name not in parts_a or name not in parts_b:
            lines.append(f"part {name}: in {'the first' if name in parts_a else 'the second'} alone")
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
    return {str(k): v for k, v in (params.items() if isinstance(params, Mapping) else enumerate(params))}


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
    """The method and what its adapters compute with; not what only records where one came from, nor sizes, which sites say."""
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
    return {"max": float((t.double() - u.double()).abs().max()), "relative": float(gap / t.double().norm().clamp_min(1e-300))}


def _lines(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{k}: {a!r} / {b!r}" for k, (a, b) in found.get("settings", {}).items()]
    for key, what in (("only_a", "first"), ("only_b", "second")):
        lines += [f"site {path}: in the {what} alone" for path in found.get(key, ())]
    for name, apart in found.get("tensors", {}).items():
        lines.append(f"{name}: {apart if isinstance(apart, str) else 'max {max:.3g}, relative {relative:.3g}'.format(**apart)}")
    return lines
