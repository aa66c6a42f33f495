"""ll.tasks: a Poly adapter's tasks as LoRAs, for rows, files and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, moved, net, normal
from torch import Tensor

import lora_lite_func as ll

MODEL = net()


def trained(**fields: Any) -> ll.Adapter:
    cfg = ll.PolyConfig(**{"r": 3, "tasks": 3, "skills": 2, "splits": 4, **fields})
    return moved(ll.init(MODEL, cfg), size=1.0)


def of_task(params: ll.Adapter, task: int) -> ll.Adapter:
    """The adapter of one task by itself, by its row of logits."""
    one = ll.init(MODEL, ll.PolyConfig(r=3, skills=2, splits=4, alpha=params.config.alpha))
    data = {
        path: {**held, "lora_logits": held["lora_logits"][task : task + 1]}
        for path, held in params.items()
    }
    return ll.Adapter(one.layout, data)


def batch(*shape: int) -> Tensor:
    return normal(*shape, 16, seed=4)


def test_each_row_has_its_task() -> None:
    params, x = trained(alpha=2.0), batch(5, 2)
    stack = ll.tasks(params)
    assert ll.num_members(stack) == 3
    ids = [2, 0, -1, 1, 2]
    y = ll.apply(MODEL, ll.rows(stack, ids), x)
    for n, task in enumerate(ids):
        own = of_task(params, task) if task >= 0 else ()
        close(y[n], ll.apply(MODEL, own, x[n]), 1e-10)
    close(ll.apply(MODEL, stack[1], x), ll.apply(MODEL, of_task(params, 1), x), 1e-10)


def test_gradients_reach_skills_and_the_tasks_that_were_called() -> None:
    params, x = trained(), batch(2)

    def loss(p: ll.Adapter) -> Tensor:
        return ll.apply(MODEL, ll.rows(ll.tasks(p), [0, 2]), x).square().sum()

    slope = ll.grad(loss)(params)
    for held in slope.values():
        assert all(held[name].any() for name in ("lora_A", "lora_B"))
        assert held["lora_logits"].any(1).tolist() == [True, False, True]
    close(torch.func.grad(loss)(params), slope, 1e-10)


def test_a_compiled_step_has_several() -> None:
    one, other, x = trained(), trained(r=2, target_names="up"), batch(2)

    def y(one: ll.Adapter, other: ll.Adapter) -> Tensor:
        both = [ll.rows(ll.tasks(p), ids) for p, ids in ((one, [0, 2]), (other, [1, -1]))]
        return ll.apply(MODEL, both, x)

    close(torch.compile(y, fullgraph=True, backend="eager")(one, other), y(one, other), 1e-10)


def test_new_tasks_are_the_base_and_their_mixtures_are_nearly_even() -> None:
    params, x = ll.init(MODEL, ll.PolyConfig(tasks=2)), batch(3)
    close(ll.apply(MODEL, ll.rows(ll.tasks(params), [0, 1, 0]), x), MODEL(x), 0.0)
    for held in params.values():
        assert held["lora_logits"].shape == (2, 4)
        assert 0 < held["lora_logits"].abs().max() <= 1e-3


def test_sampled_mixtures_are_relaxed_bernoulli_draws() -> None:
    params = trained(skills=4, splits=1)
    torch.manual_seed(0)
    first, second = (ll.tasks(params, sampled=True) for _ in range(2))
    torch.manual_seed(0)
    close(first, ll.tasks(params, sampled=True), 0.0)
    assert not torch.equal(first["layers.0.up", "lora_A"], second["layers.0.up", "lora_A"])
    # the draws of a logit are sigmoid(logit + logistic noise), whose mean over many is known
    logits = params["layers.0.up"]["lora_logits"]
    wanted = torch.distributions.RelaxedBernoulli(torch.tensor(1.0).double(), logits=logits)
    draws = wanted.sample((20000,))
    w = draws / draws.sum(-1, keepdim=True)
    A = torch.einsum("ntq,qrd->ntrd", w, params["layers.0.up"]["lora_A"][0]).mean(0)
    ours = [ll.tasks(params, sampled=True)["layers.0.up"]["lora_A"] for _ in range(3000)]
    close(torch.stack(ours).mean(0), A, 0.05)


def test_a_task_is_a_lora_that_merges_and_goes_to_files(tmp_path: Path) -> None:
    params = trained()
    one = ll.tasks(params)[2]
    assert isinstance(one.config, ll.LoRAConfig)
    close(ll.merge(MODEL, one), ll.merge(MODEL, of_task(params, 2)), 1e-12)
    ll.to_peft(one, MODEL, tmp_path)
    close(ll.merge(MODEL, ll.from_peft(tmp_path, MODEL)), ll.merge(MODEL, one), 1e-12)
    ll.save(params, tmp_path / "poly")
    close(ll.load(tmp_path / "poly", MODEL), params, 0.0)


def test_what_has_no_tasks_or_does_not_say_which() -> None:
    params, x = trained(), batch(3)
    for verb in (ll.apply, lambda m, p, x: ll.bind(m, p)(x), lambda m, p, x: ll.merge(m, p)):
        with pytest.raises(ll.UnsupportedError, match=r"3 tasks, and which .*ll\.rows\(ll\.tasks"):
            verb(MODEL, params, x)
    with pytest.raises(ll.UnsupportedError, match="tasks: lora has no tasks; adapters of ll"):
        ll.tasks(ll.init(MODEL, ll.LoRAConfig()))
    with pytest.raises(ll.StructureError, match="tasks: expected an Adapter, found dict"):
        ll.tasks({})  # type: ignore[arg-type]
    with pytest.raises(ll.StructureError, match="a stack of 2 adapters"):
        ll.tasks(ll.stack([params, params]))
