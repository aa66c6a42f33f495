"""Shares of experts by token, and the loss that keeps all of them in use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import close, normal
from torch import Tensor

import lora_lite_func as ll
from lora_lite_func.kernels.gates import gates


def logits(*shape: int) -> Tensor:
    return normal(*shape, seed=0)


def test_shares_are_a_softmax_over_the_best() -> None:
    x = logits(2, 5, 4)
    close(gates(x, None, 0.5), (2 * x).softmax(-1), 1e-12)
    found = gates(x, 2, 0.5)
    for row, own in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        best = row.argsort(descending=True)[:2]
        close(own[best], (2 * row[best]).softmax(-1), 1e-12)
        assert own.count_nonzero() == 2
    assert gates(torch.zeros(3, 4), 2, 1.0).count_nonzero(-1).tolist() == [2, 2, 2]  # of equals too
    assert gates(x.bfloat16(), 2, 1.0).dtype == torch.float32


def by_hand(p: Tensor, top_k: int | None) -> float:
    tokens = p.flatten(0, -2)
    total = 0.0
    for e in range(p.shape[-1]):
        mean = sum(t[e].item() for t in tokens) / len(tokens)
        taken = sum(e in t.argsort(descending=True)[:top_k] for t in tokens)
        f = mean if top_k is None else taken / (top_k * len(tokens))
        total += f * mean
    return p.shape[-1] * total


@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
def test_balance_is_the_papers_sum(top_k: int | None) -> None:
    p = logits(3, 7, 4).softmax(-1)
    wanted = by_hand(p, top_k)
    assert abs(ll.load_balance(p, top_k=top_k).item() - wanted) < 1e-12
    other = logits(2, 4).softmax(-1)
    both = ll.load_balance({"a": p, "b": other}, top_k=top_k)
    assert abs(both.item() - (wanted + by_hand(other, top_k)) / 2) < 1e-12
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [0] * 7])
    wanted = by_hand(p.flatten(0, 1)[mask.flatten() != 0], top_k)
    assert abs(ll.load_balance(p, top_k=top_k, mask=mask).item() - wanted) < 1e-12


def test_it_is_one_where_experts_are_used_evenly_and_e_where_one_has_all() -> None:
    even, one = torch.full((6, 4), 0.25), torch.eye(4)[[2] * 6]
    for top_k in (None, 1):
        assert ll.load_balance(one, top_k=top_k) == 4.0
    assert ll.load_balance(even) == ll.load_balance(torch.eye(4), top_k=1) == 1.0
    x = logits(20, 4).requires_grad_()
    for _ in range(200):
        (slope,) = torch.autograd.grad(ll.load_balance(x.softmax(-1), top_k=1), x)
        x = (x - 20 * slope).detach().requires_grad_()
    assert ll.load_balance(x.softmax(-1), top_k=1) < 1.05


def test_it_is_mapped() -> None:
    p = logits(5, 3, 4).softmax(-1)
    mask = torch.tensor([[1, 1, 0]] * 5)
    mapped = torch.func.vmap(lambda p, m: ll.load_balance(p, top_k=2, mask=m))(p, mask)
    loop = [ll.load_balance(u, top_k=2, mask=m) for u, m in zip(p, mask, strict=True)]
    close(mapped, torch.stack(loop), 1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ll.load_balance({}), "probabilities of a layer, found none"),
        (
            lambda: ll.load_balance({"up": logits(2, 3)}, top_k=4),
            "'up': expected top_k from 1 to 3",
        ),
        (
            lambda: ll.load_balance(logits(2, 3, 4), mask=torch.ones(2)),
            r"expected a mask \(2, 3\), one entry for each token, found \(2,\)",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ll.StructureError, match=f"load_balance: .*{message}"):
        call()
