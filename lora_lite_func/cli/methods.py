"""methods: every method, and what each would cost on a model's folder."""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn

from ..core.errors import LoraLiteError, printable
from ..core.layout import Layout
from ..core.method import Variant
from ..core.registry import variants
from ..layers.targeting import find
from .base_model import base_sizes
from .method_options import add_method_options, config_from, unused_fields
from .opening import Answer
from .targets import trainable

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "every method; with a model's folder, how many numbers each would learn there"
EXAMPLES = """\
python -m lora_lite_func methods
python -m lora_lite_func methods model_folder --r 16 --targets q_proj v_proj
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("model", nargs="?", help="the model's folder, with safetensors")
    add_method_options(parser, None)


def run(given: argparse.Namespace) -> Answer:
    """List the methods. One that can't adapt what is asked for says why instead of a cost."""
    if given.model is None:
        rows = [_facts(variant) for variant in variants().values()]
        return _table(rows), {"methods": rows}, 0
    model = base_sizes(given.model)
    size = sum(p.numel() for p in model.parameters())
    rows = [{**_facts(v), **_cost(given, v, model)} for v in variants().values()]
    rows.sort(key=lambda row: (row["trainable"] is None, row["trainable"] or 0))
    return _costs(rows, size), {"parameters": size, "methods": rows}, 0


def _facts(variant: Variant) -> dict[str, Any]:
    unused = unused_fields(variant)
    return {
        "method": variant.name,
        "good_for": variant.good_for,
        "r": "r" not in unused,
        "alpha": "alpha" not in unused,
        "kinds": list(variant.sites),
        "reads": sorted(variant.needs),
        "paper": variant.paper,
    }


def _cost(given: argparse.Namespace, variant: Variant, model: nn.Module) -> dict[str, Any]:
    try:
        cfg = config_from(given, variant)
        sites = [site for site, _ in find(model, variant, cfg)]
        layout = Layout(variant, cfg, sites)
        found = trainable(layout, layout.names)
    except LoraLiteError as error:
        return {"sites": None, "trainable": None, "why": str(error)}
    return {"sites": len(sites), "trainable": found, "why": None}


def _table(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["method"]) for row in rows)
    words = max(len(row["good_for"]) for row in rows)
    head = f"{'method':<{width}}  {'good for':<{words}}  takes     reads at the start         paper"
    lines = [head]
    for row in rows:
        takes = " ".join(name for name in ("r", "alpha") if row[name])
        reads = ", ".join(row["reads"]) or "shapes alone"
        first = f"{row['method']:<{width}}  {row['good_for']:<{words}}"
        lines.append(f"{first}  {takes:<8}  {reads:<25}  {row['paper']}".rstrip())
    return "\n".join(lines)


def _costs(rows: list[dict[str, Any]], size: int) -> str:
    width = max(len(row["method"]) for row in rows)
    lines = [f"of a base of {size:,} parameters:"]
    lines.append(f"{'method':<{width}}  {'sites':>5} {'trainable':>14} {'of base':>8}  reads")
    for row in rows:
        if row["trainable"] is None:
            lines.append(f"{row['method']:<{width}}  {printable(row['why'])}")
            continue
        part = f"{100 * row['trainable'] / size:.3f}%"
        reads = ", ".join(row["reads"]) or "shapes alone"
        count = f"{row['sites']:>5} {row['trainable']:>14,}"
        lines.append(f"{row['method']:<{width}}  {count} {part:>8}  {reads}")
    return "\n".join(lines)
