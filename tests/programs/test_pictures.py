"""The documents' drawings: each is drawn in both themes, small, with its words inside its page."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import PAGES, ROOT

from benchmarks import pictures

pytest.importorskip("matplotlib", reason="extra: demo").use("Agg")


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_small_and_stands_in_a_page(name: str, tmp_path: Path) -> None:
    files = pictures.drawn(name, tmp_path)
    assert [file.name for file in files] == [f"{name}-light.svg", f"{name}-dark.svg"]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert len(text) < 40_000
        assert "<text" in text  # words stay words
        home = ROOT / pictures.PICTURES[name][0]
        assert (home / file.name).is_file(), "run: python -m benchmarks.pictures"
        assert sum(file.name in page for page in PAGES.values()) == 1


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_no_words_leave_the_page(name: str) -> None:
    page = pictures.PICTURES[name][1](pictures.THEMES["light"])
    page.figure.canvas.draw()
    edge = page.figure.bbox
    for words in page.axes.texts:
        if words.get_text():
            box = words.get_window_extent()
            assert edge.x0 <= box.x0, words.get_text()
            assert box.x1 <= edge.x1, words.get_text()
