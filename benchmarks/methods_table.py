"""README's table of methods, rendered from the variants' records: `python -m benchmarks.methods_table README.md` rewrites it."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_lite_func.variants import TABLE

BEGIN, END = "<!-- methods: rendered by benchmarks/methods_table.py -->", "<!-- end of methods -->"


def render() -> str:
    """The table: config, name in files, what it does, on which side of the layer it acts, what it reads, paper."""
    rows = ["| config | name | what | acts on | reads | paper |", "|---|---|---|---|---|---|"]
    for variant in sorted(TABLE, key=lambda v: v.name):
        doc = (sys.modules[variant.param_specs.__module__].__doc__ or "").splitlines()[0].rstrip(".")
        what = doc.split(": ", 1)[-1]
        side = " and ".join(s for s, f in (("input", variant.inputs), ("output", variant.outputs)) if f is not None) or "weight"
        reads = ", ".join(sorted(variant.needs)) or "nothing"
        rows.append(f"| `ll.{variant.config.__name__}` | `{variant.name}` | {what} | {side} | {reads} | {variant.paper} |")
    return "\n".join(rows)


def rewritten(text: str) -> str:
    """README with the table as the records say it."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{render()}\n{END}{after}"


if __name__ == "__main__":
    readme = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    readme.write_text(rewritten(readme.read_text(encoding="utf-8")), encoding="utf-8")
