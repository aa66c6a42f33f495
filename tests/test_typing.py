"""A user's program under `mypy --strict`: the types of the package as a user gets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ("--strict", "--config-file=", "--follow-imports=silent", "--cache-dir=.mypy_cache/user")
"""Imported packages are read as a user's installed ones are: errors inside them aren't his."""


def test_a_users_program_type_checks_strictly() -> None:
    pytest.importorskip("mypy")
    program = str(ROOT / "tests" / "typing_user.py")
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *FLAGS, program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "lora_lite_func" / "py.typed").is_file()
