"""Plots are drawn (what they look like is for eyes); the table of relatives has what was probed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import moved, net

import lora_lite_func as ll
from benchmarks.measure import others

pytest.importorskip("matplotlib").use("Agg")


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_and_results_are_drawn(tmp_path: Path) -> None:
    from benchmarks.measure import plots

    for name, config in (("a", ll.LoRAConfig(r=2)), ("b", ll.HRAConfig(r=2))):
        ll.save(moved(ll.init(net(dtype=torch.float32), config)), tmp_path / name)
    methods = {
        "lora": {"trainable": 100, "scores": [0.1, 0.4]},
        "ia3": {"trainable": 10, "scores": [0.1, 0.2]},
    }
    (tmp_path / "result.json").write_text(json.dumps({"methods": methods}))
    made = [
        file
        for name in ("a", "b", "result.json")
        for file in plots.drawn(tmp_path / name, tmp_path / "out")
    ]
    assert len(made) == 4  # what HRA changes depends on the base
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in made)


def test_the_relatives_table_has_a_column_for_each_that_was_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"version": "0.3", "methods": "1", "identity": 0.0, "vmap": 1.2e-6}
    monkeypatch.setattr(others, "probed", lambda python, name: found)
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{others.START}\nold\n{others.END}\nbelow\n", encoding="utf-8")
    others.main(["--lorax", "python", "--report", str(readme)])
    head, rows, end = readme.read_text(encoding="utf-8").partition(
        f"| adapter methods | {len(ll.variants())} | 1 |"
    )
    assert rows
    assert head.startswith(f"above\n{others.START}\n| | here | lorax |\n|---|---|---|\n")
    assert end.endswith(f"| 1e-06 |\n{others.END}\nbelow\n")
    monkeypatch.undo()
    monkeypatch.setitem(others.PROGRAMS, "lorax", "import nothing_of_the_kind")
    with pytest.raises(RuntimeError, match=r"lorax by .*No module named"):
        others.probed(sys.executable, "lorax")
