"""What the suite leaves: lines of a table, a JSON file, a page's table, plots of the growth."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .harness import Row

__all__ = [
    "BEGIN",
    "END",
    "HEADER",
    "line",
    "plots",
    "put_between",
    "rewritten",
    "rows_of",
    "table",
    "write",
]

BEGIN, END = (
    "<!-- performance: rendered by python -m benchmarks --report -->",
    "<!-- end of performance -->",
)
HEADER = (
    f"{'area':11} {'what':46} {'value':>7} {'target':>8} {'verdict':8} {'guard':>6}  over; peers"
)


# -------------------------------------------------------------------------------------------- lines
def line(area: str, row: Row) -> str:
    """A row as a line of the table on stdout."""
    guard = "" if row.guard is None else f"{row.guard:.3f}"
    what = row.what if row.curve is None else f"{row.what}, {row.curve[1]} {row.curve[2]:g}"
    peers = "".join(f"; {name} {number(value)}" for name, value in row.peers.items())
    figures = f"{number(row.value):>7} {_target(row):>8} {row.verdict:8} {guard:>6}"
    return f"{area:11} {what:46} {figures}  {row.over}{peers}"


def _target(row: Row) -> str:
    return "" if row.target is None else f"{'>=' if row.at_least else '<='} {row.target:g}"


def number(value: float) -> str:
    """Three or four digits of it, whatever its size."""
    if not math.isfinite(value):
        return "-"
    return (
        f"{value:.0f}"
        if abs(value) >= 100 or value == int(value)
        else f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.3f}"
    )


# --------------------------------------------------------------------------------------------- json
def write(file: Path, rows: Mapping[str, Sequence[Row]], facts: Mapping[str, Any]) -> None:
    """The rows by area, with the facts of the run (versions, machine)."""
    areas = {
        name: [dataclasses.asdict(row) | {"verdict": row.verdict} for row in found]
        for name, found in rows.items()
    }
    file.write_text(json.dumps({**facts, "areas": areas}, indent=1) + "\n", encoding="utf-8")


def rows_of(result: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The rows of a JSON that `write` wrote."""
    return {area: [_row(found) for found in rows] for area, rows in result["areas"].items()}


def _row(found: Mapping[str, Any]) -> Row:
    fields = {name: value for name, value in found.items() if name != "verdict"}
    return Row(**{**fields, "curve": tuple(fields["curve"]) if fields["curve"] else None})


# --------------------------------------------------------------------------------- the page's table
def table(result: Mapping[str, Any]) -> str:
    """The page's table: every figure that isn't a point of a curve, and what it was taken on."""
    lines = [
        "| area | what | over | lora_lite_func | others | target |",
        "|---|---|---|---|---|---|",
    ]
    for area, rows in rows_of(result).items():
        for row in rows:
            if row.curve is None:
                value = "void" if row.verdict == "void" else number(row.value)
                peers = ", ".join(f"{name} {number(v)}" for name, v in row.peers.items())
                target = _target(row).replace("<= ", "≤ ").replace(">= ", "≥ ")
                value = f"**{value}** (missed)" if row.verdict == "missed" else value
                lines.append(
                    f"| {area.replace('_', ' ')} | {row.what} | {row.over} | {value} | {peers} | "
                    f"{target} |"
                )
    return "\n".join([*lines, "", _taken_on(result)])


def _taken_on(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"Taken on {machine['device']}, {machine['torch_threads']} threads; {packages}."


def rewritten(text: str, result: Mapping[str, Any]) -> str:
    """A page with the table of that run between its markers; the text as it is, if it has none.

    Raises:
        ValueError: the run was a quick one, whose figures are nothing to report.
    """
    if result.get("quick"):
        raise ValueError(
            "expected a run without --quick, found a quick one: its figures aren't to be reported"
        )
    marked = BEGIN in text and END in text
    return put_between(text, BEGIN, END, table(result)) if marked else text


def put_between(text: str, begin: str, end: str, body: str) -> str:
    """A page with a body between two marks.

    Raises:
        ValueError: it lacks one of them.
    """
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"expected the marks {begin!r} and {end!r}")
    return f"{before}{begin}\n{body}\n{end}{after}"


# -------------------------------------------------------------------------------------------- plots
def plots(folder: Path, rows: Mapping[str, Sequence[Row]]) -> list[Path]:
    """A PNG for each title among the curves; a line for each `what` and for each of its peers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    charts: dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in (row for found in rows.values() for row in found if row.curve is not None):
        assert row.curve is not None
        title, axis, x = row.curve
        lines = charts.setdefault((title, axis, row.over), {})
        for name, value in {row.what: row.value, **row.peers}.items():
            lines.setdefault(name, []).append((x, value))
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for (title, axis, over), lines in charts.items():
        figure, chart = plt.subplots(figsize=(6.4, 4), layout="constrained")
        for name, points in lines.items():
            chart.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
        chart.set_xscale("log", base=2)
        chart.set(xlabel=axis, ylabel=over, title=title)
        chart.set_ylim(bottom=0)
        chart.spines[["top", "right"]].set_visible(False)
        chart.grid(axis="y", alpha=0.25, linewidth=0.6)
        chart.legend(frameon=False)
        files.append(folder / f"{title.replace(' ', '-').replace(',', '')}.png")
        figure.savefig(files[-1], dpi=130)
        plt.close(figure)
    return files
