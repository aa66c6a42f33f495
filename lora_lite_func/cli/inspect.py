"""What an adapter is and how two differ, as data and as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.config import to_dict
from ..interop.peft.folder import unpack

__all__ = ["delta_norm", "describe_raw", "inspected", "table"]

_CHEAP = 2**24  # entries of an update that is built to be measured


def delta_norm(adapter: Adapter, path: str) -> float | None:
    """The Frobenius norm of a site's update W' - W; None where it depends on W, or is too large to
    build.
    """
    site, variant = adapter.sites[path], adapter.layout.variant
    if (
        not variant.additive
        or variant.weight is None
        or site.num_experts
        or site.d_in * site.d_out > _CHEAP
    ):
        return None
    held = {
        name: t.detach().to(torch.float32) if t.is_floating_point() else t
        for name, t in adapter[path].items()
    }
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
        row: dict[str, Any] = {
            "site": path,
            "kind": site.kind,
            "d_in": site.d_in,
            "d_out": site.d_out,
            "r": site.r,
            "alpha": site.alpha,
        }
        row["tensors"] = {
            name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in held.items()
        }
        row["trainable"] = sum(
            t.numel() for name, t in held.items() if adapter.layout.specs[path][name].trainable
        )
        row["norm"] = None if members else delta_norm(adapter, path)
        rows.append(row)
    size = sum(t.nbytes for held in adapter.values() for t in held.values())
    every = {"trainable": sum(int(row["trainable"]) for row in rows), "bytes": size}
    return {
        "method": adapter.layout.variant.name,
        "members": members,
        "config": to_dict(adapter.config),
        **every,
        "sites": rows,
    }


def _members(adapter: Adapter) -> int:
    """How many a stack has; 0 for a plain adapter."""
    path, names = next(iter(adapter.layout.names.items()))
    leaf: Tensor = adapter[path][names[0]]
    return leaf.shape[0] if leaf.ndim > len(adapter.layout.specs[path][names[0]].shape) else 0


def table(data: Mapping[str, Any]) -> str:
    """`inspected` or `describe_raw` for people."""
    if "parts" in data:
        return "\n\n".join(f"[{name}]\n{table(part)}" for name, part in data["parts"].items())
    if "keys" in data:
        width = max(map(len, data["keys"]), default=0)
        return "\n".join(
            [
                f"{data['method']} (PEFT)",
                *(f"  {k:<{width}}  {s} {d}" for k, (s, d) in data["keys"].items()),
            ]
        )
    of = f" x {data['members']}" if data["members"] else ""
    head = f"{data['method']}{of}: {len(data['sites'])} sites, {data['trainable']:,} trainable parameters, {data['bytes']:,} bytes"
    said = ", ".join(
        f"{k}={v!r}"
        for k, v in data["config"].items()
        if not k.endswith(("_names", "_pattern", "_parameters", "_kinds"))
    )
    width = max(len(row["site"]) for row in data["sites"])
    lines = [
        head,
        f"  {said}",
        f"  {'site':<{width}}  {'kind':<9} {'d_in':>7} {'d_out':>7} {'r':>4} {'alpha':>7} "
        f"{'params':>11} {'|dW|':>9}",
    ]
    for row in data["sites"]:
        norm = "" if row["norm"] is None else f"{row['norm']:.4g}"
        numbers = f"{row['d_in']:>7} {row['d_out']:>7} {row['r']:>4} {row['alpha']:>7g} {row['trainable']:>11,} {norm:>9}"
        lines.append(f"  {row['site']:<{width}}  {row['kind']:<9} {numbers}")
    return "\n".join(lines)


def describe_raw(path: str) -> dict[str, Any]:
    """A PEFT folder as it is, where its meaning hangs on a base that isn't given."""
    says, tensors = unpack(path, None)
    keys = {
        key: [list(t.shape), str(t.dtype).removeprefix("torch.")]
        for key, t in sorted(tensors.items())
    }
    return {"method": str(says.get("peft_type")), "config": dict(says), "keys": keys}
