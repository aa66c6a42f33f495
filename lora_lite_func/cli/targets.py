"""targets: which layers of a model's folder a method would adapt."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import Any

from ..core.errors import printable
from ..core.layout import Layout
from ..layers.targeting import find
from .base_model import base_sizes
from .method_options import add_method_options, config_from, method_named
from .opening import Answer

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run", "trainable"]

HELP = "which layers of a model's folder a method would adapt, by their sizes alone"
EXAMPLES = """\
python -m lora_lite_func targets model_folder
python -m lora_lite_func targets model_folder --method dora --targets q_proj v_proj --layers 0 1 -1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("model", help="the model's folder, with safetensors")
    add_method_options(parser)


def run(given: argparse.Namespace) -> Answer:
    """List the sites. In text, those that differ in their numbers alone share a line."""
    variant = method_named(given.method)
    cfg = config_from(given, variant)
    sites = [site for site, _ in find(base_sizes(given.model), variant, cfg)]
    layout = Layout(variant, cfg, sites)
    rows = [
        {
            "site": site.path,
            "kind": site.kind,
            "d_in": site.d_in,
            "d_out": site.d_out,
            "trainable": trainable(layout, [site.path]),
        }
        for site in sites
    ]
    total = trainable(layout, layout.names)
    return _text(given.method, rows, total), {"sites": rows, "trainable": total}, 0


def trainable(layout: Layout, paths: Iterable[str]) -> int:
    """How many numbers would be learned at these paths of a layout, where its leaves live."""
    return sum(
        _count(layout.specs[path][name].shape)
        for path in paths
        for name in layout.names[path]
        if layout.specs[path][name].trainable
    )


def _count(shape: Iterable[int]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


def _text(method: str, rows: list[dict[str, Any]], total: int) -> str:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        path = re.sub(r"(?<![^.])\d+(?![^.])", "*", row["site"])
        key = (printable(path), row["kind"], row["d_in"], row["d_out"])
        groups.setdefault(key, []).append(row["trainable"])
    width = max(len(path) for path, *_ in groups)
    head = f"  {'site':<{width}}  {'kind':<9} {'d_in':>7} {'d_out':>7} {'sites':>5} {'params':>12}"
    lines = [f"{method}: {len(rows)} sites, {total:,} trainable parameters", head]
    for (path, kind, d_in, d_out), counts in groups.items():
        lines.append(
            f"  {path:<{width}}  {kind:<9} {d_in:>7} {d_out:>7} {len(counts):>5} {sum(counts):>12,}"
        )
    return "\n".join(lines)
