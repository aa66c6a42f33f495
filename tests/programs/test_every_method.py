"""The study of every method: how it searches a rate, what it holds back, what its table says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

from benchmarks.examples import every_method, sentiment


@pytest.mark.parametrize("best", [1e-4, 3e-3, 1e-2, 3e-1])
@pytest.mark.parametrize("start", [1e-3, 3e-2])
def test_the_search_goes_uphill_until_both_sides_are_known(start: float, best: float) -> None:
    tried: dict[float, float] = {}
    rate: float | None = start
    while rate is not None:
        tried[rate] = -abs(math.log(rate / best))
        rate = every_method.next_rate(tried)
    assert max(tried, key=lambda rate: tried[rate]) == pytest.approx(best)
    assert len(tried) >= 3
    assert all(f"{rate:.0e}"[0] in "13" for rate in tried)


def test_rates_and_scores_are_of_words_that_nothing_learns_from(offline: None) -> None:
    pytest.importorskip("transformers")
    task = sentiment.load(None, batch=8, seed=0, device="cpu", limit=100)
    learning, validation = every_method.split(task)
    assert learning.train == validation.train
    parts = [
        {word for word, _ in part}
        for part in (learning.train, learning.held_out, validation.held_out)
    ]
    assert [len(part) for part in parts] == [70, 20, 10]
    assert len(set.union(*parts)) == 100


def test_a_study_is_written_goes_on_and_is_rendered(
    offline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    file, page = tmp_path / "every.json", tmp_path / "page.md"
    options = ["--limit", "60", "--out", str(file), "--variants"]
    assert every_method.main([*options, "bitfit"]) == 0
    assert "head-only: lr 0.003" in capsys.readouterr().out
    assert every_method.main([*options, "bitfit,tokens"]) == 0
    printed = capsys.readouterr().out
    assert "bitfit" not in printed
    assert "tokens: lr" in printed
    rows = json.loads(file.read_text(encoding="utf-8"))["methods"]
    assert list(rows) == ["head-only", "bitfit", "tokens"]
    assert len(rows["bitfit"]["validation"]) >= 3
    assert len(rows["bitfit"]["test"]) == len(every_method.SEEDS)
    page.write_text(f"before\n{every_method.BEGIN}\n{every_method.END}\nafter\n", encoding="utf-8")
    assert every_method.main(["--report", str(file), str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| bitfit | " in text
    assert "60 words in all, 3 seeds" in text
    with pytest.raises(SystemExit, match="expected rows of 50 words, found 60"):
        every_method.main(["--limit", "50", "--out", str(file), "--variants", "bitfit"])


def test_a_method_that_is_not_above_the_head_alone_is_said_to_be() -> None:
    row = {"lr": 0.003, "validation": {}, "trainable": 385, "seconds": 1.0}
    result = {
        "versions": {"torch": "2"},
        "words": 60,
        "methods": {
            "head-only": row | {"test": [0.70, 0.71, 0.72]},
            "better": row | {"test": [0.80, 0.81, 0.82]},
            "no_better": row | {"test": [0.71, 0.73, 0.75]},
            "unlike": {"left_out": "no such layer"},
        },
    }
    lines = every_method.table(result).splitlines()
    assert lines[2] == "| better | 385 | 0.003 | 0.810 | 0.800 to 0.820 |  |"
    assert lines[3].endswith("| not above the head alone |")
    assert lines[4].endswith("|  |")
    assert "Left out, since they don't fit the task: unlike." in lines
