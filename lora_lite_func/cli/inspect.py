"""inspect: what an adapter is, as data and as text."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..algebra.tree import num_params
from ..core.adapter import Adapter, leaves
from ..core.config import to_dict
from ..core.errors import printable
from ..interop.assembly import ModelNeededError
from ..interop.open import form_of
from ..interop.peft.folder import unpack
from .health import health, health_lines, update_norm
from .opening import Answer, add_component, opened, parts_of

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "what an adapter is: method, config, sites, numbers of parameters, norms of its updates"
EXAMPLES = """\
python -m lora_lite_func inspect adapter.safetensors
python -m lora_lite_func inspect peft_folder --model model_folder --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("file", help="an adapter's file of any form, or a PEFT folder")
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="the base, for files that don't say both sides of a layer, or which layers they mean",
    )
    add_component(parser)


def run(given: argparse.Namespace) -> Answer:
    """Describe the adapter. Of a PEFT folder that can't be understood without its base, list the
    tensors.

    Raises:
        ModelNeededError: another file needs its base, or the base that was given isn't enough.
    """
    try:
        data = inspected(opened(given.file, given.model, given.component, given.rename))
    except ModelNeededError as error:
        if given.model is not None or form_of(given.file) != "peft":
            raise
        data = _raw(given.file)
        return f"{_raw_table(data)}\n{printable(str(error))} (--model)", data, 0
    return _tables(data), data, 0


# ------------------------------------------------------------------------------------------ as data
def inspected(params: Any) -> dict[str, Any]:
    """Return a description of an adapter, or of several, in JSON types."""
    if isinstance(params, Adapter):
        return _one(params)
    return {"parts": {name: _one(part) for name, part in parts_of(params).items()}}


def _one(adapter: Adapter) -> dict[str, Any]:
    labels = getattr(adapter.layout, "labels", None)
    rows = [_site(adapter, path) for path in adapter.sites]
    return {
        "method": adapter.layout.variant.name,
        "members": _members(adapter),
        "names": None if labels is None else list(labels),
        "config": to_dict(adapter.config),
        "trainable": num_params(adapter),
        "bytes": sum(t.nbytes for t in leaves(adapter)),
        "sites": rows,
        "health": health(adapter, {row["site"]: row["norm"] for row in rows}),
    }


def _site(adapter: Adapter, path: str) -> dict[str, Any]:
    site, held, specs = adapter.sites[path], adapter[path], adapter.layout.specs[path]
    return {
        "site": path,
        "kind": site.kind,
        "d_in": site.d_in,
        "d_out": site.d_out,
        "r": site.r,
        "alpha": site.alpha,
        "tensors": {name: _form(t) for name, t in held.items()},
        "trainable": sum(
            held[name].numel() for name in adapter.layout.names[path] if specs[name].trainable
        ),
        "norm": update_norm(adapter, path),
    }


def _form(t: Tensor) -> list[Any]:
    return [list(t.shape), str(t.dtype).removeprefix("torch.")]


def _members(adapter: Adapter) -> int:
    """Return the number of a stack's members, or 0 for a plain adapter."""
    path, names = next(iter(adapter.layout.names.items()))
    leaf: Tensor = adapter[path][names[0]]
    return leaf.shape[0] if leaf.ndim > len(adapter.layout.specs[path][names[0]].shape) else 0


def _raw(path: str) -> dict[str, Any]:
    """Describe a PEFT folder as it is, because its meaning depends on a base that isn't given."""
    says, tensors = unpack(path, None)
    keys = {key: _form(t) for key, t in sorted(tensors.items())}
    return {"method": str(says.get("peft_type")), "config": dict(says), "keys": keys}


# ------------------------------------------------------------------------------------------ as text
def _tables(data: Mapping[str, Any]) -> str:
    if "parts" not in data:
        return _table(data)
    return "\n\n".join(
        f"[{printable(name)}]\n{_table(part)}" for name, part in data["parts"].items()
    )


def _table(data: Mapping[str, Any]) -> str:
    of = f" x {data['members']}" if data["members"] else ""
    names = "" if data["names"] is None else f" ({', '.join(map(printable, data['names']))})"
    hidden = ("_names", "_pattern", "_parameters", "_kinds")
    said = [f"{k}={v!r}" for k, v in data["config"].items() if not k.endswith(hidden)]
    paths = [printable(row["site"]) for row in data["sites"]]
    width = max(map(len, paths))
    lines = [
        f"{data['method']}{of}{names}: {len(paths)} sites, {data['trainable']:,} trainable "
        f"parameters, {data['bytes']:,} bytes",
        f"  {', '.join(said)}",
        f"  {'site':<{width}}  {'kind':<9} {'d_in':>7} {'d_out':>7} {'r':>4} {'alpha':>7} "
        f"{'params':>11} {'|dW|':>9}",
    ]
    for path, row in zip(paths, data["sites"], strict=True):
        norm = "" if row["norm"] is None else f"{row['norm']:.4g}"
        lines.append(
            f"  {path:<{width}}  {row['kind']:<9} {row['d_in']:>7} {row['d_out']:>7} "
            f"{row['r']:>4} {row['alpha']:>7g} {row['trainable']:>11,} {norm:>9}"
        )
    odd = health_lines(data["health"], len(paths))
    return "\n".join([*lines, *(f"  ! {printable(line)}" for line in odd)])


def _raw_table(data: Mapping[str, Any]) -> str:
    keys = {printable(key): form for key, form in data["keys"].items()}
    width = max(map(len, keys), default=0)
    lines = [f"  {key:<{width}}  {shape} {dtype}" for key, (shape, dtype) in keys.items()]
    return "\n".join([f"{printable(data['method'])} (PEFT)", *lines])
