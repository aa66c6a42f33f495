"""A prepared model is the bound one with what depends on the adapter alone made once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import CASES, Case, start
from counting import counted
from helpers import close, moved, net, normal, same_state, snapshot

import lora_lite_func as ll


def ready(case: Case) -> tuple[torch.nn.Module, ll.Adapter, torch.Tensor]:
    model = net(bias=True)
    return (
        model,
        moved(start(case, model, case.config(r=4))),
        normal(5, 16, seed=2, dtype=torch.float32).double(),
    )


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_prepared_is_bound_in_every_form(case: Case) -> None:
    model, params, x = ready(case)
    before = snapshot(model)
    bound, once = ll.bind(model, params), ll.prepared(model, params)
    assert same_state(before, snapshot(model))
    assert not any(p.requires_grad for p in once.parameters())
    with torch.no_grad():
        y = bound(x)
        close(once(x), y, 1e-12)
        close(once(x.repeat(80, 1)), y.repeat(80, 1), 1e-12)
        close(copy.deepcopy(once)(x), y, 1e-12)
        close(pickle.loads(pickle.dumps(once))(x), y, 1e-12)
        if not case.noise:  # which is drawn in training
            close(once.train()(x), y, 1e-12)
        assert set(once.state_dict()) == set(bound.state_dict())
        half = copy.deepcopy(once).eval().float()
        close(half(x.float()).double(), y, 1e-3)
    assert once.eval()(x).grad_fn is None


@pytest.mark.parametrize(
    "name", ["dora", "hra", "oft_4", "boft", "loha", "delora", "ssvd", "pissa", "adalora"]
)
def test_prepared_makes_nothing_of_the_adapter_again(name: str) -> None:
    model, params, x = ready(next(case for case in CASES if repr(case) == name))
    bound, once = ll.bind(model, params), ll.prepared(model, params)
    assert counted(lambda: once(x)).operations < counted(lambda: bound(x)).operations
    assert (
        counted(lambda: once.train()(x)).operations == counted(lambda: bound.train()(x)).operations
    )


def test_prepared_is_a_snapshot_of_the_adapter_and_takes_several() -> None:
    model, x = net(), torch.randn(3, 16).double()
    params, gate = moved(ll.init(model, ll.DoRAConfig(r=2))), moved(ll.init(model, ll.IA3Config()))
    once = ll.prepared(model, (params, gate))
    y = ll.apply(model, (params, gate), x)
    close(once(x), y, 1e-12)
    with torch.no_grad():
        for held in params.values():
            held["lora_m"].mul_(2.0)
    close(once(x), y, 1e-12)
    stack = ll.stack([gate, gate])
    close(
        ll.prepared(model, ll.rows(stack, [0, 1, -1]))(x),
        ll.apply(model, ll.rows(stack, [0, 1, -1]), x),
        1e-12,
    )


def test_prepared_compiles_to_one_graph() -> None:
    model, x = net(), torch.randn(3, 16).double()
    once = ll.prepared(model, moved(ll.init(model, ll.OFTConfig(block_size=4))))
    compiled = torch.compile(once, fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(x), once(x), 1e-12)
