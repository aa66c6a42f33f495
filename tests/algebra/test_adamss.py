"""AdaMSS's allocation: the budget, the choice of PEFT's own, what is frozen stays as it is."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import close, moved, net
from hypothesis import given
from torch import Tensor, nn

import lora_lite_func as ll

Schedule = ll.adamss.Schedule
SIZES = {"r": 6, "num_subspaces": 4, "subspace_rank": 2}


@given(
    total=st.integers(5, 80),
    target=st.integers(1, 5),
    first=st.integers(0, 20),
    length=st.integers(1, 90),
    exponent=st.floats(0.5, 5.0),
)
def test_the_budget_falls_from_all_to_the_target(
    total: int, target: int, first: int, length: int, exponent: float
) -> None:
    schedule = Schedule(
        target=target, first_step=first, last_step=first + length, exponent=exponent
    )
    found = [ll.adamss.budget(schedule, total, step) for step in range(first + length + 5)]
    assert found == sorted(found, reverse=True)
    assert found[: first + 1] == [total] * (first + 1)
    assert found[-5:] == [target] * 5


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 16, bias=False), nn.Linear(16, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


def of_peft(made: Any, start: ll.Adapter) -> dict[str, dict[str, Tensor]]:
    """What PEFT's layers hold, as ours do."""
    data = {}
    for path in start:
        site = made.base_model.model.get_submodule(path)
        rows, q = site.seg_result["default"], SIZES["subspace_rank"]
        A, B = site.adamss_A["default"], site.adamss_B["default"]
        cluster = torch.zeros(site.out_features)
        held = {"lora_A": torch.zeros(len(A), q, A[0].shape[1])}
        held["lora_B"] = torch.zeros(site.out_features, q)
        for i, own in rows.items():
            cluster[own] = float(i)
            held["lora_A"][i, : len(A[i])] = A[i].detach()
            held["lora_B"][own, : B[i].shape[1]] = B[i].detach()
        data[path] = held | {"lora_N": site.adamss_newB["default"], "lora_cluster": cluster}
    return data


def masks(made: Any, start: ll.Adapter) -> dict[str, list[bool]]:
    """Which subspaces PEFT trains."""
    return {
        path: [p.requires_grad for p in made.base_model.model.get_submodule(path).adamss_A.default]
        for path in start
    }


@pytest.mark.parametrize("interval", [3, 6])
def test_it_is_peft_s_but_for_one_subspace(interval: int) -> None:
    """PEFT keeps what is above the last one's importance, one fewer than its target, so it is asked
    for one more in the last choice.
    """
    peft = pytest.importorskip("peft")
    pytest.importorskip("sklearn")
    model = Two()
    config = peft.AdamssConfig(
        use_asa=True,
        asa_target_subspaces=4,
        init_warmup=2,
        final_warmup=6,
        mask_interval=interval,
        target_modules=["a", "b"],
        **SIZES,
    )
    made = peft.get_peft_model(Two(), config)
    start = ll.init(model, ll.AdaMSSConfig(**SIZES))
    params = ll.Adapter(start.layout, of_peft(made, start))
    schedule = Schedule(target=3, first_step=2, last_step=6, interval=interval)
    state = ll.adamss.start(params, schedule)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
    gen = torch.Generator().manual_seed(1)
    for step in range(1, 10):
        x, target = torch.randn(32, 12, generator=gen), torch.randn(32, 12, generator=gen)
        optimizer.zero_grad()
        (made(x) - target).square().mean().backward()
        optimizer.step()
        if interval < 6 and step == interval:  # the same number here and there
            here = ll.adamss.budget(schedule, 8, step)
            there = made.base_model._schedule_threshold
            made.base_model._schedule_threshold = lambda *_, count=here + 1: count
        made.base_model.update_and_allocate(step)
        if interval < 6 and step == interval:
            made.base_model._schedule_threshold = there

        def loss(p: ll.Adapter, x: Tensor = x, target: Tensor = target) -> Tensor:
            return (ll.apply(model, p, x) - target).square().mean()

        grads = ll.grad(loss)(params)
        trainable, frozen = ll.partition(params)
        stepped = torch.utils._pytree.tree_map(
            lambda p, g: p - 0.5 * g, trainable, ll.partition(grads)[0]
        )
        params, state = ll.adamss.allocate(ll.combine(stepped, frozen), grads, state, step)
        for path, held in of_peft(made, start).items():
            for name in ("lora_A", "lora_B"):
                close(params[path][name], held[name], 1e-4)
        trained = {path: mask.tolist() for path, mask in state.keep.items()}
        assert trained == masks(made, start), step
    assert sum(sum(mask) for mask in trained.values()) == 3


def test_what_is_frozen_stays_whatever_the_optimizer_does() -> None:
    model, x = net(), torch.randn(9, 16, dtype=torch.float64)
    params = moved(ll.init(model, ll.AdaMSSConfig(**SIZES)), size=0.3)
    state = ll.adamss.start(params, Schedule(target=5, first_step=1, last_step=4, interval=2))
    optimizer = ll.adamw(1e-2)
    moments = optimizer.init(ll.partition(params)[0])
    at_4: Any = None
    for step in range(1, 9):
        trainable, frozen = ll.partition(params)

        def loss(t: ll.Adapter, frozen: ll.Adapter = frozen) -> Tensor:
            return ll.apply(model, ll.combine(t, frozen), x).square().mean()

        grads = ll.grad(loss)(trainable)
        trainable, moments = optimizer.update(grads, moments, trainable)
        params, state = ll.adamss.allocate(ll.combine(trainable, frozen), grads, state, step)
        at_4 = params if step == 4 else at_4
    assert sum(int(mask.sum()) for mask in state.keep.values()) == 5
    for path, keep in state.keep.items():
        same = [
            torch.equal(a, b)
            for a, b in zip(params[path]["lora_A"], at_4[path]["lora_A"], strict=True)
        ]
        assert same == [not kept for kept in keep.tolist()]


def test_what_is_refused() -> None:
    model = net()
    params = ll.init(model, ll.AdaMSSConfig(**SIZES))
    with pytest.raises(ll.StructureError, match=r"an adapter of ll\.AdaMSSConfig, found lora"):
        ll.adamss.start(ll.init(model, ll.LoRAConfig()), Schedule())
    with pytest.raises(ll.StructureError, match="at most the 16 subspaces, found 50"):
        ll.adamss.start(params, Schedule())
    for fields, said in (
        ({"first_step": 9, "last_step": 9}, "0 <= first_step < last_step"),
        ({"target": 0}, "target and interval of at least 1"),
        ({"beta1": 1.0}, "betas in"),
    ):
        with pytest.raises(ll.ConfigError, match=said):
            Schedule(**fields)
