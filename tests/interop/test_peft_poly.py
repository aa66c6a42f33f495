"""PEFT's Poly and MHR: files both ways, and its outputs for each task."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, moved, normal
from peft_models import base, peft
from torch import Tensor

import lora_lite_func as ll

pytestmark = pytest.mark.filterwarnings("ignore")

X = normal(4, 3, 16, seed=0, dtype=torch.float32)
TASKS = torch.tensor([2, 0, 1, 2])


def outputs(model: Any) -> Tensor:
    """PEFT's outputs, of which each row has its task. It takes inputs of three dimensions alone."""
    with torch.no_grad():
        y: Tensor = model.base_model(X, task_ids=TASKS)
    return y


@pytest.mark.parametrize("splits", [1, 4])
def test_both_ways(splits: int, tmp_path: Path) -> None:
    config = peft.PolyConfig(
        r=3, n_tasks=3, n_skills=2, n_splits=splits, target_modules=["up", "down"]
    )
    theirs = peft.get_peft_model(copy.deepcopy(base()), config).eval()
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in theirs.parameters():
            p += p.requires_grad * 0.5 * torch.randn(p.shape, generator=gen)
    theirs.save_pretrained(tmp_path / "theirs")
    for model in (base(), None):
        params = ll.from_peft(tmp_path / "theirs", model)
        assert (params.config.tasks, params.config.splits) == (3, splits)
        y = ll.apply(base(), ll.rows(ll.tasks(params), TASKS), X)
        close(y, outputs(theirs), 1e-5)
    cfg = ll.PolyConfig(r=3, tasks=3, skills=2, splits=splits, alpha=4.0)
    ours = moved(ll.init(base(), cfg), size=0.5)
    ll.to_peft(ours, base(), tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base()), tmp_path / "ours").eval()
    close(outputs(again), ll.apply(base(), ll.rows(ll.tasks(ours), TASKS), X), 1e-5)


def test_a_file_that_its_config_denies_is_refused(tmp_path: Path) -> None:
    params = ll.init(base(), ll.PolyConfig(r=3, tasks=2))
    ll.to_peft(params, base(), tmp_path)
    file = tmp_path / "adapter_config.json"
    said = json.loads(file.read_text())
    for field, value in (("n_skills", 3), ("n_tasks", 5), ("r", 4)):
        file.write_text(json.dumps(said | {field: value}))
        with pytest.raises(ll.CheckpointError, match=r"expected factors of n_splits, n_skills, r"):
            ll.from_peft(tmp_path, base())
    unlike = ll.init(base(), ll.PolyConfig(r=3, rank_pattern={"up": 2}))
    with pytest.raises(ll.UnsupportedError, match="one Poly file has one r"):
        ll.to_peft(unlike, base(), tmp_path)
