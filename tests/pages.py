"""The documents of the repository: their Python blocks, their commands, their links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("lora_lite_func", "benchmarks", ".github")
PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", *sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))]
}
"""{path in the repository: text}."""


def blocks(page: str, language: str) -> list[str]:
    """A page's blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.M | re.S)


def commands(page: str) -> list[str]:
    """The command lines of a page's shell blocks, without their comments."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [bare for line in lines if (bare := re.sub(r"(^|\s)#.*", "", line).strip())]


def named_commands(page: str) -> Iterator[str]:
    """Commands that stand in a page's sentences and tables, between backticks."""
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    yield from re.findall(r"`((?:python|pytest|pip|torchrun) [^`]+)`", prose)


def links(page: str) -> list[str]:
    """Where a page's relative links lead."""
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    found = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(
        r"(?:src|srcset)=\"([^\"]+)\"", prose
    )
    return [link for link in found if not re.match(r"\w+:", link)]


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", PAGES[page], re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
