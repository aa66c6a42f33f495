"""Indices as leaves: exact whatever the layer's size, and refused where a cast has rounded them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lora_lite_func as ll
from lora_lite_func.kernels import positions

WIDE = 2**24 + 3
"""One of the sizes whose last indices float32 can't hold."""


def table(ids: int = WIDE) -> nn.Module:
    """A model whose embedding has so many ids, of one feature."""
    return nn.Sequential(nn.Embedding(ids, 1, dtype=torch.float32))


@pytest.mark.parametrize(
    ("size", "dtype"), [(1, torch.float32), (2**24, torch.float32), (2**24 + 1, torch.float64)]
)
def test_the_dtype_holds_every_index(size: int, dtype: torch.dtype) -> None:
    assert positions.index_dtype(size) is dtype
    last = torch.tensor([max(size - 1, 0)])
    assert positions.decoded(last.to(dtype), size).equal(last)


def test_token_ids_beyond_2_24_are_exact_in_calls_files_and_gradients(tmp_path: Path) -> None:
    model, last = table(), WIDE - 1
    cfg = ll.TokensConfig(token_ids=(last,), target_kinds="embedding", exclude_names=())
    params = ll.init(model, cfg)
    assert params["0", "lora_ids"].tolist() == [last]
    row = {"lora_rows": torch.tensor([[5.0]])}
    params = ll.Adapter(params.layout, {"0": {**params["0"], **row}})
    x = torch.tensor([last - 1, last])
    shift = ll.apply(model, params, x) - model(x)
    torch.testing.assert_close(shift, torch.tensor([[0.0], [5.0]]))
    ll.save(params, tmp_path / "a.safetensors")
    loaded = ll.load(tmp_path / "a.safetensors", model)
    assert loaded["0", "lora_ids"].equal(params["0", "lora_ids"])
    half = ll.cast(params, torch.bfloat16)
    assert half["0", "lora_ids"].dtype is torch.float64
    grads = torch.func.grad(lambda p: ll.apply(model, p, x).sum())(params)
    assert grads["0", "lora_rows"].tolist() == [[1.0]]
    with pytest.raises(ll.UnsupportedError, match=r"below 16777219 are stored as torch.float64"):
        ll.bind(model, params).float()(x)


def test_entries_beyond_2_24_are_exact() -> None:
    spec = positions.spec(2, 2, WIDE)
    assert spec.dtype is torch.float64
    leaf = positions.pack(torch.tensor([WIDE - 1, 2 * WIDE - 1]), WIDE).to(spec.dtype)
    rows, columns = positions.unpack(leaf, 2, WIDE)
    assert (rows.tolist(), columns.tolist()) == ([0, 1], [WIDE - 1, WIDE - 1])
    made = positions.dense(leaf, torch.tensor([3.0, 4.0]), 2, WIDE)
    assert made[:, -1].tolist() == [3.0, 4.0]
    assert made[:, :-1].count_nonzero() == 0


def test_rounded_token_ids_are_refused() -> None:
    cfg = ll.TokensConfig(token_ids=(3001,), target_kinds="embedding", exclude_names=())
    bound = ll.bind(table(4000), ll.init(table(4000), cfg)).half()
    with pytest.raises(ll.UnsupportedError, match=r"found torch.float16.*ll.cast before ll.bind"):
        bound(torch.tensor([3001]))
