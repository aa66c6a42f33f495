"""The suite: one area after another, each against the bare base and PEFT, as ratios with targets.

python -m benchmarks                      all of it: minutes
python -m benchmarks --only forward train
python -m benchmarks --quick              a look, nothing to report
python -m benchmarks --report run.json benchmarks/README.md     the table there, from a run's JSON
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .measure import results
from .measure.harness import Row, Suite, machine, versions
from .measure.peers import lora_lite_package

AREAS = (
    "forward",
    "train",
    "functional",
    "sets",
    "serving",
    "methods",
    "memory",
    "files",
    "compile",
    "growth",
    "import_time",
)
"""Modules of this package with a function `area(suite: Suite) -> Iterator[Row]`."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=AREAS,
        default=AREAS,
        metavar="NAME",
        help=f"of {', '.join(AREAS)}",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds and small sizes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lora-lite", type=Path, help="a checkout of lora-lite to measure beside")
    parser.add_argument(
        "--json", type=Path, help="where to write the figures, with versions and machine"
    )
    parser.add_argument(
        "--report",
        nargs=2,
        type=Path,
        metavar=("JSON", "PAGE"),
        help="no run: rewrite a page's table from a run's JSON",
    )
    parser.add_argument(
        "--plots", type=Path, help="a folder for plots of the growth, with --json or --report"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Run the areas asked for, print the table, write the JSON; the rows by area."""
    given = parse(arguments)
    if given.report:
        source, readme = given.report
        result = json.loads(source.read_text(encoding="utf-8"))
        readme.write_text(
            results.rewritten(readme.read_text(encoding="utf-8"), result), encoding="utf-8"
        )
        if given.plots:
            results.plots(given.plots, results.rows_of(result))
        return results.rows_of(result)
    if given.lora_lite is not None:
        try:
            lora_lite_package(given.lora_lite)
        except ValueError as error:
            sys.exit(f"error: {error}")
    torch.set_num_threads(given.threads)
    suite = Suite(given.quick, given.device, given.lora_lite)
    rows: dict[str, list[Row]] = {}
    facts = {"versions": versions(), "machine": machine(given.device), "quick": given.quick}
    print(results.HEADER)
    for name in given.only:
        start = time.perf_counter()
        rows[name] = []
        for row in importlib.import_module(f"{__package__}.measure.{name}").area(suite):
            rows[name].append(row)
            print(results.line(name, row), flush=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        if given.json:  # after each area, so that a later one that fails takes nothing along
            results.write(given.json, rows, facts)
    if given.plots:
        results.plots(given.plots, rows)
    return rows


if __name__ == "__main__":
    main()
