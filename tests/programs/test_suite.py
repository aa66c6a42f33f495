"""The suite of ratios: what it refuses before it measures, and how it counts memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as suite
from benchmarks.measure.harness import peak


def test_no_checkout_is_an_error_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"error: --lora-lite .*expected a checkout of lora-lite"):
        suite.main(["--only", "forward", "--lora-lite", str(tmp_path / "nowhere")])
    package = tmp_path / "src" / "lora_lite"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(SystemExit, match=r"can't be imported .*not_installed_anywhere"):
        suite.main(["--only", "forward", "--lora-lite", str(tmp_path)])
    assert capsys.readouterr().out == ""


def test_every_area_can_be_asked_for() -> None:
    for name in suite.AREAS:
        assert suite.parse(["--only", name]).only == [name]
    assert {"functional", "serving"} < set(suite.AREAS)


def test_the_peak_is_what_lives_at_once() -> None:
    held = torch.zeros(1000)

    def call() -> torch.Tensor:
        a = torch.ones(256)  # 1 KiB
        b = a + 1
        del a
        c = b.view(16, 16).mT * 2  # a third one, while the second lives
        held.add_(1)
        return c.sum() + (b + b).sum()

    assert 3 * 1024 <= peak(call) < 3 * 1024 + 64
