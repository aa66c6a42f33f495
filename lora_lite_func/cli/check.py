"""check: whether an adapter fits a model, and what its values show."""

from __future__ import annotations

import argparse

from ..core.errors import printable
from .health import health, health_lines
from .opening import Answer, add_component, opened, parts_of

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = (
    "whether an adapter fits a model, by their sizes alone, and whether its values are numbers; "
    "exit code 1 if not"
)
EXAMPLES = """\
python -m lora_lite_func check model_folder adapter.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("model", help="the model's folder, with safetensors")
    parser.add_argument("adapter", help="an adapter's file of any form, or a PEFT folder")
    add_component(parser)


def run(given: argparse.Namespace) -> Answer:
    """Check the adapter against the model, where a misfit is an error that says why. A tensor with
    NaN or infinity is a fault too.
    """
    params = opened(given.adapter, given.model, given.component, given.rename)
    sites = [path for part in parts_of(params).values() for path in part]
    found = health(params)
    ok = not found["not_finite"]
    text = f"fits: {len(sites)} sites of {printable(given.model)}"
    odd = [f"! {printable(line)}" for line in health_lines(found, len(sites))]
    data = {"fits": True, "ok": ok, "sites": sites, "health": found}
    return "\n".join([text, *odd]), data, int(not ok)
