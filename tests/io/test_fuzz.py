"""A few hundred damaged files; `python tests/fuzz_files.py` runs ten thousand."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import fuzz_files as fuzz
import pytest


@pytest.mark.filterwarnings("ignore")  # what torch says of a damaged pickle
def test_a_damaged_file_is_read_or_refused_with_words(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    targets = fuzz.targets(tmp_path / "good")
    outcomes = set()
    for target in targets:
        if not target.name.endswith("alone"):  # some methods can't be read without the base
            target.read(target.folder)
        (tmp_path / "good" / "commands" / "b.safetensors").unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "good" / "commands" / "out", ignore_errors=True)
    for i in range(300):
        target = targets[i % len(targets)]
        outcomes.add(fuzz.attempt(target, random.Random(f"test {i}"), tmp_path / "work"))
    assert {"read", "CheckpointError"} <= outcomes
