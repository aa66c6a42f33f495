"""The pictures are drawn; what they look like is for eyes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import moved, net

import lora_lite_func as ll

pytest.importorskip("matplotlib").use("Agg")


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_and_results_are_drawn(tmp_path: Path) -> None:
    from benchmarks import plots

    for name, config in (("a", ll.LoRAConfig(r=2)), ("b", ll.HRAConfig(r=2))):
        ll.save(moved(ll.init(net(dtype=torch.float32), config)), tmp_path / name)
    methods = {"lora": {"trainable": 100, "scores": [0.1, 0.4]}, "ia3": {"trainable": 10, "scores": [0.1, 0.2]}}
    (tmp_path / "result.json").write_text(json.dumps({"methods": methods}))
    made = [file for name in ("a", "b", "result.json") for file in plots.drawn(tmp_path / name, tmp_path / "out")]
    assert len(made) == 4  # what HRA changes depends on the base
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in made)
