"""Tables in the documents that follow from the code.

python -m benchmarks.tables     rewrites each where it stands

methods   what each method does, on which side of the layer, what its start reads, its paper
kinds     which kinds of site each method can adapt
verbs     the public functions and classes that aren't configs, by their docstrings
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import lora_lite_func as ll
from lora_lite_func.interop.peft.methods import METHODS, TOKENS
from lora_lite_func.layers.kinds import KINDS
from lora_lite_func.variants import METHODS as OWN
from lora_lite_func.variants import FullConfig, TokensConfig

__all__ = ["PAGES", "kinds", "main", "methods", "rewritten", "verbs"]

ROOT = Path(__file__).parent.parent
GUIDES = ROOT / "lora_lite_func" / "guides"


def methods() -> str:
    """Config, name, what it does, on which side it acts, what it reads, PEFT's file, paper."""
    rows = [
        f"As of version {ll.__version__}, {len(OWN)} methods.",
        "",
        "| config | name | what | acts on | reads | PEFT file | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    peft_types: dict[type, str] = {}
    for codec in METHODS.values():
        for cfg in codec.configs:
            both = [peft_types[cfg]] if cfg in peft_types else []
            peft_types[cfg] = ", ".join([*both, codec.peft_type])
    peft_types |= {TokensConfig: TOKENS.peft_type, FullConfig: "modules_to_save"}
    for variant in _own():
        doc = sys.modules[variant.param_specs.__module__].__doc__ or ""
        what = doc.partition("\n")[0].rstrip(".").split(": ", 1)[-1]
        sides = (
            ("input", variant.inputs),
            ("output", variant.outputs),
            ("whole call", variant.virtual),
        )
        acts_on = " and ".join(side for side, phase in sides if phase is not None) or "weight"
        reads = ", ".join(sorted(variant.needs)) or "nothing"
        pair = "LORA" if variant.low_rank_factors is not None else ""
        rows.append(
            f"| `ll.{variant.config.__name__}` | `{variant.name}` | {what} | {acts_on} | {reads} | "
            f"{peft_types.get(variant.config, pair)} | {variant.paper} |"
        )
    return "\n".join(rows)


def kinds() -> str:
    """Which kinds of site each method can adapt; its default in bold."""
    rows = [f"| name | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    groups: dict[tuple[str, ...], list[str]] = {}
    for variant in _own():
        marks = tuple(_mark(kind, variant.sites) for kind in KINDS)
        groups.setdefault(marks, []).append(f"`{variant.name}`")
    rows += [f"| {' '.join(names)} | {' | '.join(marks)} |" for marks, names in groups.items()]
    return "\n".join(rows)


def _own() -> list[ll.Variant]:
    """The library's methods by name, without those that a program has registered."""
    return [variant for name, variant in ll.variants().items() if name in OWN]


def _mark(kind: str, sites: tuple[str, ...]) -> str:
    if kind not in sites:
        return ""
    return "**yes**" if kind == sites[0] else "yes"


def verbs() -> str:
    """Every public name that isn't a method's config: the first sentence of its docstring, and the
    guide that uses it first.
    """
    configs = {variant.config.__name__ for variant in _own()}
    guides = {page: (GUIDES / page).read_text(encoding="utf-8") for page in _guides_in_order()}
    rows = ["| name | what | see |", "|---|---|---|"]
    for name in sorted(set(ll.__all__) - configs, key=lambda n: (n.lower(), n)):
        text = " ".join((inspect.getdoc(getattr(ll, name)) or "").partition("\n\n")[0].split())
        first = re.split(r"(?<=[.;])\s", text)[0].rstrip(".;:").replace("|", r"\|")
        page = next((p for p, words in guides.items() if re.search(rf"\bll\.{name}\b", words)), "")
        see = f"[{page.removesuffix('.md').replace('_', ' ')}]({page})" if page else ""
        rows.append(f"| `ll.{name}` | {first} | {see} |")
    return "\n".join(rows)


def _guides_in_order() -> list[str]:
    """The pages as the index of the guides lists them."""
    index = (GUIDES / "README.md").read_text(encoding="utf-8")
    return list(dict.fromkeys(re.findall(r"\]\((\w+\.md)\)", index.partition("<!--")[0])))


PAGES: dict[str, Callable[[], str]] = {"methods": methods, "kinds": kinds, "verbs": verbs}
"""What stands between the marks `NAME: rendered by benchmarks/tables.py` and `end of NAME`."""


def rewritten(text: str) -> str:
    """A page with its tables as the code says them."""
    for name, render in PAGES.items():
        begin, end = f"<!-- {name}: rendered by benchmarks/tables.py -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        if found:
            text = f"{before}{begin}\n{render()}\n{end}{rest.partition(end)[2]}"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite the pages that are named, or all that have such a table."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pages", nargs="*", type=Path, help="(default: every page that has one)")
    given = parser.parse_args(arguments)
    pages = [
        page
        for folder in ("lora_lite_func", "benchmarks")
        for page in (ROOT / folder).rglob("*.md")
    ]
    for page in given.pages or [ROOT / "README.md", *sorted(pages)]:
        text = page.read_text(encoding="utf-8")
        made = rewritten(text)
        if made != text:
            page.write_text(made, encoding="utf-8")
            print(page)


if __name__ == "__main__":
    main()
