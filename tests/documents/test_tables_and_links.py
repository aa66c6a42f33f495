"""The documents against the tree: generated tables, links, files that they name, the wheel."""

from __future__ import annotations

import importlib
import posixpath
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from pages import PAGES, ROOT, anchors, links

import lora_lite_func as ll
from benchmarks import tables
from lora_lite_func.variants import METHODS


@pytest.mark.parametrize("page", PAGES)
def test_generated_tables_are_what_the_code_says(page: str) -> None:
    assert tables.rewritten(PAGES[page]) == PAGES[page], "run: python -m benchmarks.tables"


def test_every_method_says_in_six_words_what_it_is_good_for() -> None:
    words = {v.name: v.good_for.split() for v in tables.own()}
    assert not [name for name, said in words.items() if not 1 <= len(said) <= 6]
    assert len({tuple(said) for said in words.values()}) == len(words)


def test_readme_counts_the_methods() -> None:
    cases = importlib.import_module("cases")
    configs = {type(case.config(r=4)).__name__ for case in cases.CASES + cases.CALIBRATED}
    held = [name for name, (_, config) in METHODS.items() if config in configs]
    assert f"every law of layers | {len(held)} of {len(METHODS)};" in PAGES["README.md"]


def test_every_generated_table_stands_somewhere() -> None:
    for name in tables.PAGES:
        begin = f"<!-- {name}: rendered by benchmarks/tables.py -->"
        assert sum(begin in text for text in PAGES.values()) == 1, name


def test_ratios_in_readme_are_figures_of_the_performance_table() -> None:
    figures: defaultdict[str, set[str]] = defaultdict(set)
    for area, row in re.findall(r"^\| (\w+) \| (.*) \|$", PAGES["benchmarks/README.md"], re.M):
        for number in re.findall(r"\d+\.\d+", row):
            figures[area] |= {f"{float(number):.2f}", f"{float(number):.1f}"}
    command = r"^(\| .*) \| `python -m benchmarks --only (\w+)` \|$"
    best = re.findall(command, PAGES["README.md"], re.M)
    assert len(best) >= 5
    for row, area in best:
        for number in re.findall(r"(\d+\.\d+)(?:x| times)", row):
            says = f"README says {number}, which is no figure of {area} in benchmarks/README.md"
            assert number in figures[area] or float(number) == 1.0, says


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        assert (ROOT / target).exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}"


def test_every_page_can_be_found_from_readme() -> None:
    found, pending = set(), ["README.md"]
    while pending:
        page = pending.pop()
        if page not in PAGES or page in found:
            continue
        found.add(page)
        home = posixpath.dirname(page)
        pending += [
            posixpath.normpath(posixpath.join(home, x.partition("#")[0])) for x in links(page)
        ]
    assert found == PAGES.keys()


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    named = re.findall(r"`((?:lora_lite_func|tests|benchmarks|\.ci)/[\w./]*)`", prose)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{page} names {', '.join(missing)}"


def test_public_names_are_shown_in_the_guides() -> None:
    guides = "".join(text for page, text in PAGES.items() if "/guides/" in page)
    shown = re.sub(r"<!-- verbs.*?<!-- end of verbs -->", "", guides, flags=re.S)
    configs = {v.config.__name__ for v in ll.variants().values()}
    missing = [
        name
        for name in set(ll.__all__) - configs
        if not re.search(rf"\bll\.{name}\b|`{name}`", shown)
    ]
    assert not missing, f"name these in a guide: {', '.join(sorted(missing))}"


def test_names_that_the_pages_use_exist() -> None:
    for page, text in PAGES.items():
        for name in re.findall(r"\bll\.(\w+)", text):
            assert hasattr(ll, name), f"{page}: ll.{name}"


# ---------------------------------------------------------------------------------------- the wheel
SHIPPED = [page for page in PAGES if page.startswith("lora_lite_func/")]


def test_the_guides_are_package_data() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with 3.11")
    tomllib = importlib.import_module("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["lora_lite_func"]
    package = ROOT / "lora_lite_func"
    matched = {path for pattern in patterns for path in package.glob(pattern)}
    assert {ROOT / page for page in SHIPPED} <= matched


def test_a_build_copies_the_guides(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    code = f"""
import setuptools
setuptools.setup(script_args=["-q", "build_py", "--build-lib", {str(tmp_path)!r}])
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert set(SHIPPED) <= made
    assert "lora_lite_func/py.typed" in made
    assert "lora_lite_func/interop/peft/methods/hra.py" in made
    assert not any(name.startswith(("tests", "benchmarks")) for name in made)
