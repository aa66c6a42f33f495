"""README's table of methods, rendered from the variants' records: `python -m benchmarks.methods_table README.md` rewrites it."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_lite_func.layers.kinds import KINDS
from lora_lite_func.variants import TABLE

BEGIN, END = "<!-- methods: rendered by benchmarks/methods_table.py -->", "<!-- end of methods -->"
BEGIN_KINDS, END_KINDS = (
    "<!-- kinds: rendered by benchmarks/methods_table.py -->",
    "<!-- end of kinds -->",
)


def render() -> str:
    """The table: config, name in files, what it does, on which side of the layer it acts, what it
    reads, paper.
    """
    rows = ["| config | name | what | acts on | reads | paper |", "|---|---|---|---|---|---|"]
    for variant in sorted(TABLE, key=lambda v: v.name):
        doc = (
            (sys.modules[variant.param_specs.__module__].__doc__ or "").splitlines()[0].rstrip(".")
        )
        what = doc.split(": ", 1)[-1]
        side = (
            " and ".join(
                s
                for s, f in (("input", variant.inputs), ("output", variant.outputs))
                if f is not None
            )
            or "weight"
        )
        reads = ", ".join(sorted(variant.needs)) or "nothing"
        rows.append(
            f"| `ll.{variant.config.__name__}` | `{variant.name}` | {what} | {side} | {reads} | "
            f"{variant.paper} |"
        )
    return "\n".join(rows)


def render_kinds() -> str:
    """The second table: which kinds of place each method can adapt; the one that it takes when
    nothing is said in bold.
    """
    rows = [f"| name | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    groups: dict[tuple[str, ...], list[str]] = {}
    for variant in sorted(TABLE, key=lambda v: v.name):
        marks = tuple(
            "" if kind not in variant.sites else "**yes**" if kind == variant.sites[0] else "yes"
            for kind in KINDS
        )
        groups.setdefault(marks, []).append(f"`{variant.name}`")
    rows += [f"| {' '.join(names)} | {' | '.join(marks)} |" for marks, names in groups.items()]
    return "\n".join(rows)


def rewritten(text: str) -> str:
    """README with the tables as the records say them."""
    for begin, end, table in ((BEGIN, END, render()), (BEGIN_KINDS, END_KINDS, render_kinds())):
        before, found, rest = text.partition(begin)
        if found:
            text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    readme = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    readme.write_text(rewritten(readme.read_text(encoding="utf-8")), encoding="utf-8")
