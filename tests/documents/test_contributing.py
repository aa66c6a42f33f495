"""CONTRIBUTING against the tree: the files that each kind of addition touches, a call's way."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pages import PAGES, ROOT
from test_import import PACKAGES

import lora_lite_func as ll
from lora_lite_func.layers.kinds import KINDS

CONTRIBUTING = PAGES[".github/CONTRIBUTING.md"]


def section(heading: str) -> dict[str, str]:
    """{file: what goes there} of the table under a heading of CONTRIBUTING."""
    text = CONTRIBUTING.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)`[^|]*\| (.*) \|$", text, re.M)
    assert len(rows) >= 3, heading
    return dict(rows)


def test_every_file_that_contributing_names_is_there() -> None:
    named = set(re.findall(r"`((?:lora_lite_func|tests|benchmarks)/[\w/.]+)`", CONTRIBUTING))
    assert len(named) >= 40
    assert not {name for name in named if not (ROOT / name).exists()}


def mentions(word: str, *folders: str) -> set[str]:
    """Files of these folders, and of the package's root, that have a word in them."""
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    found = {file for file in files if re.search(word, file.read_text(encoding="utf-8"), re.M)}
    return {str(file.relative_to(ROOT)) for file in found}


def test_the_packages_table_is_the_rule_that_imports_are_held_to() -> None:
    rows = re.findall(r"^\| `(\w+)/` \| .* \| ([\w, ]*)\|$", CONTRIBUTING, re.M)
    assert {name: set(re.findall(r"\w+", others)) for name, others in rows} == PACKAGES


def visited(call: Callable[[], object]) -> set[str]:
    """The package's files that a call goes through."""
    found = set()

    def look(frame: types.FrameType, event: str, _: object) -> None:
        found.add(frame.f_code.co_filename)

    call()  # what is imported or made at the first call isn't of the way
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {str(Path(f).relative_to(ROOT)) for f in found if f.startswith(f"{ROOT}/lora_lite_func")}


def test_a_call_goes_through_the_files_that_contributing_says() -> None:
    linear, conv = torch.nn.Linear(8, 8), torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3))
    lora, dora = (ll.init(linear, cfg(r=2)) for cfg in (ll.LoRAConfig, ll.DoRAConfig))
    on_conv = ll.init(conv, ll.LoRAConfig(r=2, target_kinds=("conv",)))
    stack = ll.stack([lora, ll.init(linear, ll.LoRAConfig(r=2), seed=1)])
    x, image = torch.randn(4, 8), torch.randn(2, 4, 8)
    found = (
        visited(lambda: ll.apply(linear, lora, x))
        | visited(lambda: ll.apply(linear, dora, x))
        | visited(lambda: ll.apply(conv, on_conv, image))
        | visited(lambda: ll.apply(linear, ll.rows(stack, [0, 1, 1, 0]), x))
    )
    text = CONTRIBUTING.partition("## How a call goes")[2].partition("\n## ")[0]
    said = set(re.findall(r"`(lora_lite_func/[\w/]+\.py)`", text))
    assert len(said) >= 8
    assert said <= found, f"not on the way of a call: {', '.join(sorted(said - found))}"


@pytest.mark.parametrize(
    "heading", ["a method", "a kind of layer", "a PEFT codec", "a command", "a public name"]
)
def test_tables_that_a_file_gets_a_row_of_are_in_it(heading: str) -> None:
    for file, what in section(f"Add {heading}").items():
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([A-Z_]+|__all__)`", what):
            assert re.search(rf"^\s*{name}\b", text, re.M), f"{file} has no {name}"


def test_a_method_touches_the_files_that_contributing_says() -> None:
    said = section("Add a method").keys() | section("Add a PEFT codec").keys()
    found = mentions(r"\bC3AConfig\b|import C3A\b", "lora_lite_func")
    assert found == {file for file in said if file.startswith("lora_lite_func/")}
    in_tests = mentions(r"\bC3AConfig\b", "tests")
    assert in_tests >= {file for file in said if file.startswith("tests/")}


def test_a_command_touches_the_files_that_contributing_says() -> None:
    said = section("Add a command").keys()
    assert mentions(r"\"diff\": diff", "lora_lite_func/cli") == {"lora_lite_func/cli/main.py"}
    assert {"lora_lite_func/cli/main.py", "lora_lite_func/cli/diff.py"} <= said
    assert "python -m lora_lite_func diff" in PAGES["lora_lite_func/guides/serving.md"]


WHOLE_CALLS = {"call": "test_prompts.py", "cache": "test_prefixes.py"}
"""Where models of transformers stand for the laws' toy models, which embed no tokens."""


def test_a_kind_is_known_by_the_files_that_contributing_says() -> None:
    kinds = (ROOT / "lora_lite_func/layers/kinds.py").read_text(encoding="utf-8")
    places = (ROOT / "tests/laws/test_every_kind.py").read_text(encoding="utf-8")
    for name in KINDS:
        assert f'"{name}",' in kinds
        assert f'"{name}",' in places or name == "linear" or KINDS[name].whole, name
        if KINDS[name].called:
            assert (ROOT / "tests/ecosystem" / WHOLE_CALLS[name]).exists()
