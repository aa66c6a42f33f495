"""Bands of ranks: together they are each member's whole update, nothing twice; and what rows of
unlike ranks come to by them.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import close
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_lite_func as ll
from lora_lite_func.kernels.bands import RankBand, rank_bands


@given(st.lists(st.integers(1, 70), min_size=1, max_size=12), st.data())
def test_each_member_has_its_ranks_once(ranks: list[int], data: st.DataObject) -> None:
    low = data.draw(st.integers(0, len(ranks) - 1))
    high = data.draw(st.integers(low + 1, len(ranks)))
    found = rank_bands(ranks, low, high, data.draw(st.sampled_from([1, 16, 64, 4096])))
    for member in range(low, high):
        own = sorted((band.first, band.last) for band in found if band.low <= member < band.high)
        assert own[0][0] == 0
        assert own[-1][1] >= ranks[member]
        assert all(before[1] == after[0] for before, after in itertools.pairwise(own))
    assert all(low <= band.low < band.high <= high for band in found)


def test_alike_are_together_few_rows_at_the_largest_many_at_their_own() -> None:
    assert rank_bands([8] * 5, 0, 5, 64) == [RankBand(0, 5, 0, 8)]
    assert rank_bands([4, 64] * 4, 0, 8, 1) == [RankBand(0, 8, 0, 64)]
    assert rank_bands([4] * 15 + [64] * 15, 0, 30, 64) == [
        RankBand(0, 15, 0, 4),
        RankBand(15, 30, 0, 64),
    ]
    assert rank_bands([4, 8, 16, 64] * 4, 0, 16, 64) == [
        RankBand(0, 16, 0, 16),
        *(RankBand(k, k + 1, 16, 64) for k in range(3, 16, 4)),
    ]


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("train", [False, True])
def test_rows_of_unlike_ranks_and_strengths(
    monkeypatch: pytest.MonkeyPatch, width: int, train: bool
) -> None:
    model = nn.Sequential(
        nn.Linear(40, 48, dtype=torch.float64),
        nn.ReLU(inplace=True),
        nn.Linear(48, 8, bias=False, dtype=torch.float64),
    )
    gen = torch.Generator().manual_seed(0)
    ranks = [2, 7, 1, 12, 2, 12, 3]

    def member(r: int) -> ll.Adapter:
        made = ll.init(
            model,
            ll.LoRAConfig(r=r, alpha=1.5 * r if r % 2 else 4.0, rank_pattern={"2": min(r, 3)}),
        )
        return torch.utils._pytree.tree_map(
            lambda t: torch.randn(t.shape, dtype=t.dtype, generator=gen), made
        )

    members = [member(r) for r in ranks]
    stack = ll.stack(members)
    ids = [k for k in (3, 0, 1, 2, 4, 5, 6, -1) for _ in range(width)]
    x = torch.randn(len(ids), 9, 40, dtype=torch.float64, generator=gen)
    ways = {
        "one": lambda ranks, low, high, rows, costs: [RankBand(low, high, 0, max(ranks[low:high]))],
        "layers": lambda ranks, low, high, rows, costs: [
            RankBand(k, k + 1, first, last)
            for k in range(low, high)
            for first, last in ((0, 1), (1, 3), (3, 12))
            if ranks[k] > first
        ],
        "own": rank_bands,
    }
    for way in ways.values():
        monkeypatch.setattr("lora_lite_func.kernels.segments.rank_bands", way)
        bound = ll.bind(model, ll.rows(stack, ids))
        with torch.set_grad_enabled(train):
            y = bound(x)
        for row, (i, own) in enumerate(zip(ids, x, strict=True)):
            close(y[row], ll.apply(model, members[i], own) if i >= 0 else model(own), 1e-12)
        if train:
            y.square().sum().backward()
            for k, adapter in enumerate(members):
                _check_gradients(
                    bound,
                    k,
                    ll.bind(model, adapter),
                    x[[row for row, i in enumerate(ids) if i == k]],
                )


def _check_gradients(bound: nn.Module, k: int, alone: nn.Module, x: torch.Tensor) -> None:
    """Those of the stack's member k are its own, and zero beyond its ranks."""
    alone(x).square().sum().backward()
    stacked = dict(bound.named_parameters())
    for name, own in alone.named_parameters():
        if own.requires_grad:
            found = stacked[name].grad
            assert found is not None
            assert own.grad is not None
            here = tuple(slice(n) for n in own.shape)
            close(found[k][here], own.grad, 1e-10)
            rest = found[k].clone()
            rest[here] = 0.0
            assert not rest.any()
