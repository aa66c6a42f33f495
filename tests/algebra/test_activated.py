"""Adapters that act at some tokens alone: the base's output elsewhere, and generation goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from cases import CALIBRATED, CASES, Case
from families import FAMILIES
from helpers import close, moved, normal, same_state, seeded, snapshot
from test_tokens import IDS, several
from torch import Tensor, nn

import lora_lite_func as ll

every = pytest.mark.parametrize("case", CASES + CALIBRATED, ids=repr)
MASK = torch.tensor([[0, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])


@every
def test_it_is_the_base_wherever_the_mask_is_zero(case: Case) -> None:
    model, (params,) = several(case, 1)
    x, before = normal(3, 5, 16), snapshot(model)
    here = MASK[..., None] != 0
    wanted = torch.where(here, ll.apply(model, params, x), model(x))
    close(ll.apply(model, ll.activated(params, MASK), x), wanted, 1e-9)
    with torch.no_grad():
        close(ll.bind(model, ll.activated(params, MASK.bool(), goes_on=True))(x), wanted, 1e-9)
    assert same_state(before, snapshot(model))


def test_rows_weights_and_several_adapters_are_masked() -> None:
    model, members = several(CASES[0])
    stack, x = ll.stack(members), normal(3, 5, 16)
    both = ll.activated([members[0], {"other": members[1]}], MASK)
    wanted = torch.where(MASK[..., None] != 0, ll.apply(model, members[:2], x), model(x))
    close(ll.apply(model, both, x), wanted, 1e-9)
    for ids in (IDS, IDS[:, 0]):
        own = ids if ids.ndim > 1 else ids[:, None]
        wanted = ll.apply(model, ll.rows(stack, torch.where(MASK != 0, own, -1)), x)
        close(ll.apply(model, ll.activated(ll.rows(stack, ids), MASK), x), wanted, 1e-9)
    for w in (normal(3, 3), normal(3, 5, 3)):
        own = w if w.ndim > 2 else w[:, None]
        wanted = ll.apply(model, ll.mixed(stack, own * MASK[..., None]), x)
        close(ll.apply(model, ll.activated(ll.mixed(stack, w), MASK), x), wanted, 1e-9)


def test_gradients_maps_and_graphs() -> None:
    model, (params, _) = several(CASES[0], 2)
    x = normal(3, 5, 16)

    def loss(p: ll.Adapter, mask: Tensor = MASK) -> Tensor:
        return ll.apply(model, ll.activated(p, mask), x).square().sum()

    def wanted(p: ll.Adapter) -> Tensor:
        here = MASK[..., None] != 0
        return torch.where(here, ll.apply(model, p, x), model(x)).square().sum()

    close(ll.grad(loss)(params), ll.grad(wanted)(params), 1e-9)
    close(torch.func.grad(loss)(params), ll.grad(wanted)(params), 1e-9)
    masks = torch.stack([MASK, 1 - MASK])
    doubled = torch.func.grad(lambda p: loss(p, MASK * 2))  # a mask that is made inside
    close(doubled(params), torch.func.grad(loss)(params), 1e-12)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, masks)
    for i, mask in enumerate(masks):
        close(pytree.tree_map(lambda t, i=i: t[i], each), torch.func.grad(loss)(params, mask), 1e-9)
    ys = torch.func.vmap(lambda m: loss(params, m))(masks)
    close(ys, torch.stack([loss(params, m) for m in masks]), 1e-9)
    step = torch.compile(loss, fullgraph=True, backend="eager")
    close(torch.stack([step(params, m) for m in masks]), ys, 1e-9)


@pytest.mark.parametrize(
    "cfg",
    [
        ll.LoRAConfig(r=2),
        ll.HRAConfig(r=2),
        ll.FullConfig(target_parameters=(r"q_proj\.weight$",)),
    ],
    ids=["lora", "hra", "full"],
)
def test_generation_goes_on_with_and_without_a_cache(cfg: ll.AdapterConfig) -> None:
    model = FAMILIES["llama"].fresh()
    inputs = torch.tensor([[8, 5, 6, 7, 5, 6, 9], [5, 6, 8, 9, 3, 4, 7], [8, 9, 3, 4, 8, 9, 3]])
    mask, how = ll.invoked(inputs, [5, 6]), {"max_new_tokens": 5, "do_sample": False}
    how |= {"eos_token_id": None, "pad_token_id": 0}
    params = moved(ll.init(model, cfg), 1, 0.3)
    bound = ll.bind(model, ll.activated(params, mask, goes_on=True))
    made = [bound.generate(inputs, use_cache=cached, **how) for cached in (True, False)]
    assert torch.equal(*made)
    assert torch.equal(made[0][2:], model.generate(inputs[2:], **how))
    for n, length in enumerate(range(7, 12)):
        later = torch.cat([mask, mask[:, -1:].expand(-1, n)], 1)
        logits = ll.apply(model, ll.activated(params, later), made[0][:, :length]).logits
        assert torch.equal(logits[:, -1].argmax(-1), made[0][:, length])


def test_what_is_invoked_begins_with_the_last_occurrence() -> None:
    ids = torch.tensor([[1, 5, 6, 5, 6], [5, 6, 1, 2, 5], [6, 5, 1, 1, 1]])
    assert ll.invoked(ids, [5, 6]).int().tolist() == [[0, 0, 0, 1, 1], [1] * 5, [0] * 5]
    assert ll.invoked(ids, (5,)).sum(1).tolist() == [2, 1, 4]
    assert not ll.invoked(ids, range(6)).any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: ll.activated(s[0], MASK[0]), ll.StructureError, r"mask \(N, T\), found \(5,\)"),
        (lambda s: ll.activated(s[0], [[1]]), ll.StructureError, r"mask \(N, T\), found list"),
        (lambda s: ll.activated("x", MASK), ll.StructureError, "expected adapters, found str"),
        (
            lambda s: ll.activated(ll.rows(s, [0, 1]), MASK),
            ll.StructureError,
            r"expected a mask of 2 rows, found shape \(3, 5\)",
        ),
        (
            lambda s: ll.activated(ll.mixed(s, torch.ones(3, 2)), MASK, goes_on=True),
            ll.UnsupportedError,
            "weights of tokens that come later aren't known",
        ),
        (
            lambda s: ll.invoked(MASK[0], [1]),
            ll.StructureError,
            r"input_ids \(N, T\), found \(5,\)",
        ),
        (lambda s: ll.invoked(MASK, []), ll.StructureError, "at least one invocation token"),
    ],
)
def test_what_cannot_be_activated_is_refused(call: Any, error: Any, message: str) -> None:
    stack = ll.stack(several(CASES[0], 2)[1])
    with pytest.raises(error, match=message):
        call(stack)


def test_a_method_that_edits_the_prompt_has_its_own_way() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 4)))
    params = ll.init(model, ll.LoReFTConfig(r=2, target_names="0"))
    with pytest.raises(ll.UnsupportedError, match=r"loreft edits tokens .*ll\.prompted"):
        ll.activated(params, MASK)
