"""What an installed copy brings: its types, its pages, what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lora_lite_func as ll

ROOT = Path(__file__).parent.parent


@pytest.fixture
def project() -> Any:
    tomllib = pytest.importorskip("tomllib", reason="came with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_file_of_the_package_is_installed(project: Any) -> None:
    package = ROOT / "lora_lite_func"
    kept = project["tool"]["setuptools"]["package-data"]["lora_lite_func"]
    listed = {path for pattern in kept for path in package.glob(pattern)}
    files = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name[0] != "."
    }
    assert package / "py.typed" in listed
    assert package / "guides" / "README.md" in listed
    assert files <= listed


def test_what_it_needs_at_run_time(project: Any) -> None:
    """safetensors writes by numpy, which only its extra brings."""
    names = [need.partition(">")[0] for need in project["project"]["dependencies"]]
    assert names == ["torch", "optree", "safetensors[torch]"]
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"].endswith("__version__")
    assert ll.__version__ == "0.2.0"
