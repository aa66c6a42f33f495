"""A few hundred damaged files; `python -m benchmarks.fuzz` runs ten thousand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks import fuzz


@pytest.mark.filterwarnings("ignore")  # what torch says of a damaged pickle
def test_a_damaged_file_is_read_or_refused_with_words(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    targets = fuzz.targets(tmp_path / "good")
    outcomes = set()
    for target in targets:
        target.read(target.folder)
    for i in range(300):
        target = targets[i % len(targets)]
        outcomes.add(fuzz.attempt(target, random.Random(f"test {i}"), tmp_path / "work"))
    assert {"read", "CheckpointError"} <= outcomes
