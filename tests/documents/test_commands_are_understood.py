"""Each command that a page names is parsed by the program that it calls, which stops there."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, ROOT, commands, named_commands

from lora_lite_func.cli import main as command_line


class _UnderstoodError(Exception):
    """A command's arguments were parsed, and it would start now."""


@pytest.fixture
def understood(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Holds a command line to the program that it calls, which parses it and stops there."""

    def stop(parser: argparse.ArgumentParser, arguments: Any = None, namespace: Any = None) -> None:
        _, more = parser.parse_known_args(arguments, namespace)
        assert not more, f"not understood: {more}"
        raise _UnderstoodError("ready")

    def check(line: str) -> None:
        for part in line.split("&&"):
            words = shlex.split(part)
            name = words[0].removeprefix(".venv/bin/")
            assert name in PROGRAMS, f"{line}: which program is {name}?"
            PROGRAMS[name](words[1:], monkeypatch)

    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    return check


def _python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file(), words[0]
        _main(importlib.import_module(Path(words[0]).stem), words[1:], monkeypatch)
    elif words[1] == "lora_lite_func":
        _main(command_line, words[2:], monkeypatch)
    elif words[1].partition(".")[0] == "benchmarks":
        name = f"{words[1]}.__main__" if words[1] == "benchmarks" else words[1]
        _main(importlib.import_module(name), words[2:], monkeypatch)
    elif words[1] == "pytest":
        _pytest(words[2:], monkeypatch)
    else:
        assert words[1] == "venv", words[1]


def _main(module: Any, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    with pytest.raises(_UnderstoodError, match="ready"):
        module.main()


def _pytest(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file or folder exists, and what `-k` names is in one of its tests."""
    paths = [word for word in words if word.startswith("tests")]
    assert all((ROOT / path).exists() for path in paths), words
    assert {w for w in words if w.startswith("-")} <= {"-q", "-x", "-k", "-n", "--dist"}, words
    if "-k" in words:
        pattern = words[words.index("-k") + 1]
        path = ROOT / paths[0]
        files = [path] if path.is_file() else path.rglob("*.py")
        text = "".join(file.read_text(encoding="utf-8") for file in files)
        rows = (ROOT / "tests" / "cases.py").read_text(encoding="utf-8")
        assert re.search(rf"def test_\w*{pattern}", text) or f'Case("{pattern}"' in rows, pattern


def _pip(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The extras and the constraints that are named exist."""
    assert words[0] == "install"
    if sys.version_info < (3, 11):
        return  # tomllib came with 3.11
    tomllib = importlib.import_module("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    assert all((ROOT / words[i + 1]).is_file() for i, word in enumerate(words) if word == "-c")


def _torchrun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _python(words[words.index("-m") :], monkeypatch)


def _on_folders(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [word for word in words[1:] if not word.startswith("-")]
    assert all((ROOT / path).is_dir() for path in paths), words


PROGRAMS: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "python": _python,
    "pytest": _pytest,
    "pip": _pip,
    "torchrun": _torchrun,
    "ruff": _on_folders,
    "mypy": _on_folders,
}


ALL_COMMANDS = [
    (page, line)
    for page in PAGES
    for line in dict.fromkeys([*commands(page), *named_commands(page)])
]


@pytest.mark.parametrize(("page", "line"), ALL_COMMANDS)
def test_a_command_is_understood(page: str, line: str, understood: Callable[[str], None]) -> None:
    understood(line)


def test_what_is_not_understood_is_found(understood: Callable[[str], None]) -> None:
    for wrong in (
        "python -m benchmarks --onyl forward",
        "python -m lora_lite_func inspect a b",
        "pip install -e '.[nothing]'",
        "pytest tests/nowhere.py",
        "pytest tests/laws -k nothing_of_the_kind",
        "curl https://example.org",
    ):
        with pytest.raises((AssertionError, SystemExit), match=r".*"):
            understood(wrong)


def test_readme_installs_twice_and_ci_runs_its_test_command() -> None:
    installing = [line for line in commands("README.md") if "pip install" in line]
    assert len(installing) == 2
    marked = re.findall(r"<!-- tests -->\n```bash\n(.*?)\n```", PAGES["README.md"], re.S)
    assert marked == [installing[1]]
    assert "'/<!-- tests -->/" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
