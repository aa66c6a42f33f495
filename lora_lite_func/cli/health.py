"""What an adapter's values alone show of a failed training run, or of a save that lost some of
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.layout import LeafSpec
from .opening import parts_of

__all__ = ["health", "health_lines", "not_finite", "update_norm"]

Health = dict[str, list[str]]
"""{"not_finite": tensors with NaN or infinity, "zero": sites whose update is zero, "cut": tensors
of which one shard was saved}."""
_CHEAP = 2**24  # the most entries of an update that is built to be measured
_FEWEST = 8  # the fewest entries of an axis that can show a shard
_SHOWN = 5


def health(params: Any, norms: Mapping[str, float | None] | None = None) -> Health:
    """Return what is odd about the values of an adapter, or of several.

    Args:
        params: the adapter, or several of them.
        norms: {site: its `update_norm`} of an adapter alone, where the caller has worked them out.
    """
    found: Health = {"not_finite": not_finite(params), "zero": [], "cut": []}
    odd = set(found["not_finite"])
    for adapter, path, shown in _places(params):
        keys = {name: _key(shown, name) for name in adapter.layout.names[path]}
        for name, key in keys.items():
            t, spec = adapter[path][name], adapter.layout.specs[path][name]
            if _has_numbers(t) and spec.trainable and key not in odd:
                cut = _cut(t, spec)
                if cut:
                    found["cut"].append(f"{key}: {cut}")
        if path in adapter.sites and odd.isdisjoint(keys.values()):
            norm = update_norm(adapter, path) if norms is None else norms[path]
            if norm == 0.0:
                found["zero"].append(shown)
    return found


def not_finite(params: Any) -> list[str]:
    """Return the names of the tensors with NaN or infinity, of an adapter or of several."""
    return [
        _key(shown, name)
        for adapter, path, shown in _places(params)
        for name in adapter.layout.names[path]
        if _has_numbers(adapter[path][name]) and not adapter[path][name].isfinite().all()
    ]


def _places(params: Any) -> Iterator[tuple[Adapter, str, str]]:
    """Yield (adapter, path, what it is called among those of several adapters) of each path where
    tensors live: sites, and groups of them that share some.
    """
    for name, adapter in parts_of(params).items():
        for path in adapter.layout.names:
            yield adapter, path, f"{name}/{path}" if name else path


def _key(shown: str, name: str) -> str:
    return f"{shown}.{name}" if shown else name


def _has_numbers(t: Tensor) -> bool:
    return t.is_floating_point() and not t.is_meta


def _cut(t: Tensor, spec: LeafSpec) -> str:
    """Return what says that a tensor is one rank's shard among zeros: nothing but zeros behind a
    whole fraction of an axis. Axes of the rank are left out, because unused directions are zeros.
    """
    members = t.ndim - len(spec.shape)
    if len(spec.shape) < 2:
        return ""
    for axis, size in enumerate(spec.shape):
        if axis == spec.rank_axis or size < _FEWEST:
            continue
        others = [i for i in range(t.ndim) if i != axis + members]
        used = (t != 0).sum(others).nonzero()
        last = int(used[-1]) + 1 if used.numel() else size
        if last < size and size % last == 0:
            return (
                f"entries {last} to {size - 1} along its axis {axis} are zero, as where one shard "
                f"of {size // last} was saved"
            )
    return ""


def update_norm(adapter: Adapter, path: str) -> float | None:
    """Return the Frobenius norm of a site's update W' - W. The result is None where the update
    depends on W, belongs to a stack, or is too large to build.
    """
    site, variant = adapter.sites[path], adapter.layout.variant
    specs = adapter.layout.specs[path]
    p = {n: t.detach().double() if t.is_floating_point() else t for n, t in adapter[path].items()}
    if site.num_experts or any(t.is_meta or t.ndim != len(specs[n].shape) for n, t in p.items()):
        return None
    if variant.low_rank_factors is not None:
        A, B, scaling = variant.low_rank_factors(adapter.config, p, site)
        # This is |B A|^2 without building B A.
        squared = ((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0)
        return float(squared.sqrt()) * abs(float(scaling))
    if not variant.additive or variant.weight is None or site.d_in * site.d_out > _CHEAP:
        return None
    zeros = torch.zeros(site.d_out, site.d_in, dtype=torch.float64)
    return float(variant.weight(adapter.config, p, site, zeros, None)[0].norm())


def health_lines(found: Mapping[str, Sequence[str]], sites: int) -> list[str]:
    """Return what is odd as lines for people."""
    lines = []
    if found["not_finite"]:
        lines.append(f"NaN or infinity in {_some(found['not_finite'])}")
    if found["zero"]:
        count = len(found["zero"])
        which = "every site" if count == sites else f"{count} of {sites} sites"
        lines.append(f"the update of {which} is zero: {_some(found['zero'])}")
    lines += [f"only in part: {line}" for line in found["cut"][:_SHOWN]]
    if len(found["cut"]) > _SHOWN:
        lines.append(f"only in part: {len(found['cut']) - _SHOWN} more")
    return lines


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name or '""' for name in names[:_SHOWN]) + more
