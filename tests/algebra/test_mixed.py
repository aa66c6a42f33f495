"""Weighted sums of a stack's updates for each row and token, equal to sums of the members' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from cases import CALIBRATED, CASES, Case, start
from families import FAMILIES
from helpers import Net, close, moved, net, normal, same_state, seeded, snapshot
from test_tokens import IDS, several
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lora_lite_func as ll

every = pytest.mark.parametrize("case", CASES + CALIBRATED, ids=repr)
ADDING = {"lora", "pissa", "delora", "bitfit", "hira", "loha", "lokr", "miss", "ssvd", "vera"}


def one_hot(ids: Tensor) -> Tensor:
    """Weights (..., 3) that choose one member each, or none for -1."""
    return F.one_hot(ids + 1, 4)[..., 1:].double()


def at_the_first_site(case: Case) -> tuple[Net, list[ll.Adapter], list[Tensor]]:
    """A net, adapters of some layers, and what comes out of the first of those in each call."""
    model, seen = net(), []
    first = start(case, model, case.config(r=4, target_names=("up",)))
    model.get_submodule("layers.0.up").register_forward_hook(lambda _m, _x, y: seen.append(y))
    return model, [moved(first, seed) for seed in range(3)], seen


# --------------------------------------------------------------------------------------------- laws
@every
def test_at_a_layer_it_is_the_weighted_sum_of_the_members_updates(case: Case) -> None:
    model, members, seen = at_the_first_site(case)
    variant, x = members[0].layout.variant, normal(3, 5, 16)
    if not variant.adds:
        assert case.name not in ADDING
        message = f"mixed: what {variant.name} does isn't a sum .* give each row one of them"
        with pytest.raises(ll.UnsupportedError, match=message):
            ll.mixed(ll.stack(members), torch.ones(3, 3))
        return
    before = snapshot(model)
    for member in ((), *members):
        ll.apply(model, member, x)
    y, *outputs = seen
    for w in (normal(3, 1, 3), normal(3, 5, 3)):
        wanted = y + sum(w[..., k : k + 1] * (out - y) for k, out in enumerate(outputs))
        mixed = ll.mixed(ll.stack(members), w if w.shape[1] > 1 else w[:, 0])
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                ll.apply(model, mixed, x)
                close(seen.pop(), wanted, 1e-9)
                ll.bind(model, mixed)(x)
                close(seen.pop(), wanted, 1e-9)
    assert same_state(before, snapshot(model))


@every
def test_rows_are_its_one_hot_case(case: Case) -> None:
    model, members = several(case)
    if not members[0].layout.variant.adds:
        return
    stack, x = ll.stack(members), normal(3, 5, 16)
    for ids in (IDS, IDS[:, 0]):
        wanted = ll.apply(model, ll.rows(stack, ids), x)
        close(ll.apply(model, ll.mixed(stack, one_hot(ids)), x), wanted, 1e-9)


@pytest.mark.parametrize("name", ["lora", "loha"])
def test_sites_may_have_weights_of_their_own(name: str) -> None:
    model, members = several(next(c for c in CASES if c.name == name))
    stack, x = ll.stack(members), normal(3, 5, 16)
    ids = {path: (IDS + n) % 4 - 1 for n, path in enumerate(stack)}
    for by_token in (True, False):
        own = {path: i if by_token else i[:, 0] for path, i in ids.items()}
        w = {path: one_hot(i) for path, i in own.items()}
        alone = [ll.rows(ll.stack([_only(m, path) for m in members]), i) for path, i in own.items()]
        wanted = ll.apply(model, alone, x)
        close(ll.apply(model, ll.mixed(stack, w), x), wanted, 1e-9)
        close(ll.bind(model, ll.mixed(stack, w))(x), wanted, 1e-9)
        masked = ll.activated(ll.mixed(stack, w), torch.ones(3, 5))
        close(ll.apply(model, masked, x), wanted, 1e-9)
        slopes = ll.grad(lambda m: ll.apply(model, m, x).square().sum())(ll.mixed(stack, w))
        assert all(g.any() for g in slopes.weights.values())


def _only(params: ll.Adapter, path: str) -> ll.Adapter:
    """The adapter at one of its sites."""
    layout = params.layout
    return ll.Adapter(
        type(layout)(layout.variant, layout.config, [layout.sites[path]]), {path: params[path]}
    )


@pytest.mark.parametrize("name", ["lora", "delora", "loha", "bitfit"])
@pytest.mark.parametrize("by_token", [False, True])
def test_gradients_reach_weights_and_leaves(name: str, by_token: bool) -> None:
    model, members = several(next(c for c in CASES if c.name == name), 2)
    trainable, frozen = ll.partition(ll.stack(members))
    w, x = normal(*((2, 3, 2) if by_token else (2, 2))), normal(2, 3, 16)
    leaves, form = pytree.tree_flatten(trainable)

    def loss(w: Tensor, *leaves: Tensor) -> Tensor:
        stack = ll.combine(pytree.tree_unflatten(leaves, form), frozen)
        return ll.apply(model, ll.mixed(stack, w), x).square().sum()

    given = (w, *leaves)
    assert torch.autograd.gradcheck(
        loss, tuple(t.detach().clone().requires_grad_() for t in given), fast_mode=True
    )
    where = tuple(range(len(given)))
    found = torch.func.grad(loss, where)(*given)
    again = [t.detach().clone().requires_grad_() for t in given]
    close(found, torch.autograd.grad(loss(*again), again), 1e-9)
    value = ll.mixed(ll.combine(trainable, frozen), w)
    whole = torch.func.grad(lambda m: ll.apply(model, m, x).square().sum())(value)
    close(whole.weights, found[0], 1e-9)


def test_ranks_and_strengths_may_differ_and_dropout_drops_for_all_members_alike() -> None:
    model = net()
    members = [
        moved(ll.init(model, ll.LoRAConfig(r=r, alpha=2.0, dropout=0.5)), r) for r in (2, 4, 8)
    ]
    stack, x = ll.stack(members), normal(3, 5, 16)
    close(
        ll.apply(model, ll.mixed(stack, one_hot(IDS)), x),
        ll.apply(model, ll.rows(stack, IDS), x),
        1e-9,
    )
    model.train()
    outputs = []
    for params in (ll.mixed(stack, one_hot(IDS)), ll.rows(stack, IDS)):
        torch.manual_seed(0)
        outputs.append(ll.apply(model, params, x))
    close(*outputs, 1e-9)


# --------------------------------------------------------------------------------------- transforms
def test_one_graph_serves_all_weights_and_they_may_be_mapped() -> None:
    model, members = several(CASES[0])
    stack, x, counter = ll.stack(members), normal(3, 5, 16), CompileCounter()
    step = torch.compile(
        lambda s, w, x: ll.apply(model, ll.mixed(s, w), x), fullgraph=True, backend=counter
    )
    many = normal(4, 3, 5, 3)
    wanted = torch.stack([ll.apply(model, ll.mixed(stack, w), x) for w in many])
    close(torch.stack([step(stack, w, x) for w in many]), wanted, 1e-9)
    assert counter.frame_count == 1
    close(torch.func.vmap(lambda w: ll.apply(model, ll.mixed(stack, w), x))(many), wanted, 1e-10)


def test_it_composes_in_order_with_rows_and_plain_adapters() -> None:
    model, members = several(CASES[0])
    gate, x = moved(ll.init(model, ll.IA3Config()), 9), normal(3, 5, 16)
    stack = ll.stack(members)
    for order in (lambda a, b, c: (a, b, c), lambda a, b, c: (c, b, a)):
        close(
            ll.apply(model, order(ll.mixed(stack, one_hot(IDS)), gate, ll.rows(stack, IDS)), x),
            ll.apply(model, order(ll.rows(stack, IDS), gate, ll.rows(stack, IDS)), x),
            1e-9,
        )


def test_a_model_generates_with_weights_for_each_row() -> None:
    model = FAMILIES["llama"].fresh()
    members = [moved(ll.init(model, ll.LoRAConfig(r=2), seed=s), s, 0.3) for s in range(3)]
    stack, inputs = ll.stack(members), torch.randint(3, 50, (3, 6))
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    w = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    made = ll.bind(model, ll.mixed(stack, w)).generate(inputs, **how)
    both = ll.combine_adapters(members[:2], [0.5, 0.5])
    for n, params in enumerate(((), both, members[2])):
        own = ll.bind(model, params).generate(inputs[n : n + 1], **how)
        assert torch.equal(made[n : n + 1], own)


# ----------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2), r"weights \(N, 2\) or \(N, T, 2\), .* of shape \(2,\)"),
        (torch.ones(2, 3), r"found torch.float32 of shape \(2, 3\)"),
        (torch.ones(2, 2, dtype=torch.complex64), "found torch.complex64"),
        ([[1.0], [1.0, 2.0]], r"expected weights \(N, 2\), found"),
    ],
)
def test_weights_that_are_none(weights: Any, message: str) -> None:
    _, members = several(CASES[0], 2)
    stack = ll.stack(members)
    with pytest.raises(ll.StructureError, match=f"mixed: .*{message}"):
        ll.mixed(stack, weights)
    with pytest.raises(ll.StructureError, match=f"mixed: 'layers.0.down': .*{message}"):
        ll.mixed(stack, dict.fromkeys(stack, weights))
    some = dict.fromkeys([*stack][1:], torch.ones(2, 2))
    with pytest.raises(
        ll.StructureError, match=r"weights for every site, differing: 'layers\.0\.d"
    ):
        ll.mixed(stack, some)


def test_sites_that_have_no_such_rows_or_tokens_are_refused() -> None:
    model, members = several(CASES[0], 2)
    stack = ll.stack(members)
    with pytest.raises(ll.StructureError, match=r"site 'layers.0.up': rows expects .* the 2 rows"):
        ll.apply(model, ll.mixed(stack, torch.ones(2, 2)), normal(3, 5, 16))
    with pytest.raises(ll.StructureError, match=r"site 'layers.0.up': .* 3 x 4 tokens"):
        ll.apply(model, ll.mixed(stack, torch.ones(3, 4, 2)), normal(3, 5, 16))
    conv = seeded(nn.Conv1d(4, 4, 1))
    kernels = ll.stack([ll.init(conv, ll.LoRAConfig(r=2, target_kinds="conv"))] * 2)
    with pytest.raises(ll.UnsupportedError, match=r"'' .Conv1d.: its weight itself is adapted"):
        ll.apply(conv, ll.mixed(kernels, torch.ones(3, 2)), normal(3, 4, 4))
