"""Leaves of indices: what can be meant, and that files hold nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import net
from torch import Tensor, nn

import lora_lite_func as ll
from lora_lite_func.kernels.indices import check_indices

WRONG = {
    "the size": 4.0,
    "negative": -1.0,
    "huge": 1e9,
    "infinite": float("inf"),
    "nan": float("nan"),
    "a fraction": 1.5,
}


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_an_index_that_cannot_be_meant(value: float) -> None:
    with pytest.raises(ll.StructureError, match=r"lora_ids: expected whole numbers from 0 to 3"):
        check_indices((torch.tensor([0.0, value, 2.0]),), (4,), "lora_ids")


def test_entries_are_different_within_a_list() -> None:
    rows, columns = torch.tensor([[0, 1, 1], [1, 1, 0]]), torch.tensor([[2, 2, 0], [0, 2, 0]])
    check_indices((rows, columns), (2, 3), "lora_idx")
    rows[1, 0] = 0
    with pytest.raises(
        ll.StructureError, match=r"expected different entries, found \[0, 0\] twice"
    ):
        check_indices((rows, columns), (2, 3), "lora_idx")


TABLE = nn.Sequential(nn.Embedding(9, 4))
CASES = {
    "shira": (net(), ll.SHiRAConfig(r=1), "lora_idx"),
    "fourierft": (net(), ll.FourierFTConfig(n_frequency=6), "lora_idx"),
    "tokens": (TABLE, ll.TokensConfig(token_ids=(2, 5)), "lora_ids"),
}


def spoilt(params: ll.Adapter, name: str, value: float) -> ll.Adapter:
    """The adapter with another index in the first place of each such leaf."""

    def change(key: str, leaf: Tensor) -> Tensor:
        if key != name:
            return leaf
        leaf = leaf.clone()
        leaf[..., 0] = leaf[..., 1] if value == -2.0 else value
        return leaf

    return ll.Adapter(
        params.layout, {p: {k: change(k, t) for k, t in held.items()} for p, held in params.items()}
    )


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("value", [*WRONG.values(), -2.0], ids=[*WRONG, "twice"])
@pytest.mark.parametrize("stacked", [False, True], ids=["one", "a stack"])
def test_a_file_with_such_an_index_is_refused(
    method: str, value: float, stacked: bool, tmp_path: Path
) -> None:
    model, config, name = CASES[method]
    good = ll.init(model, config)
    if value == 4.0:  # within a larger table
        value = 9.0 if method == "tokens" else 24.0
    bad = spoilt(good, name, value)
    ll.save(ll.stack([good, bad]) if stacked else bad, tmp_path / "a")
    with pytest.raises(ll.CheckpointError, match=rf"{name}: expected (whole numbers|different)"):
        ll.load(tmp_path / "a")
    if stacked:
        assert ll.load(tmp_path / "a", member=0).layout == good.layout
    else:
        ll.save(good, tmp_path / "a")
        assert ll.load(tmp_path / "a").layout == good.layout
