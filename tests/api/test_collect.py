"""ll.collect: the output of ll.apply, and what routers decided on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case, start
from helpers import close, moved, net, normal, same_state, seeded, snapshot
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import lora_lite_func as ll
from lora_lite_func.core.registry import variant_for

ROUTED = [c for c in CASES if variant_for(type(c.config(r=4))).router is not None]
every = pytest.mark.parametrize("case", ROUTED, ids=repr)


def several(case: Case, count: int = 1) -> tuple[Any, list[ll.Adapter]]:
    model = net()
    params = start(case, model, case.config(r=4))
    return model, [moved(params, seed) for seed in range(count)]


def batch(*shape: int) -> Tensor:
    return normal(*shape, 16, seed=2)


def seen_by(model: nn.Module, params: ll.Adapter, path: str, x: Tensor) -> Tensor:
    """What comes to a layer of the adapted model."""
    inputs: list[Tensor] = []
    layer = model.get_submodule(path)
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    ll.apply(model, params, x)
    handle.remove()
    return inputs[0]


def probabilities(params: ll.Adapter, path: str, x: Tensor) -> Tensor:
    """softmax over experts of what a site's router says of its input, by the method's record."""
    variant, site = params.layout.variant, params.sites[path]
    assert variant.router is not None
    return variant.router(params.config, params[path], None, x, site)


# --------------------------------------------------------------------------------------------- laws
@every
def test_the_output_is_apply_s_and_each_site_says_what_its_router_decided(case: Case) -> None:
    model, (params,) = several(case)
    x, before = batch(3, 5), snapshot(model)
    y, router = ll.collect(model, params, x)
    assert torch.equal(y, ll.apply(model, params, x))
    assert list(router) == list(params)
    for path, p in router.items():
        close(p, probabilities(params, path, seen_by(model, params, path, x)), 1e-12)
        close(p.sum(-1), torch.ones(3, 5, dtype=torch.float64), 1e-12)
    assert same_state(before, snapshot(model))


@every
def test_rows_have_their_own_adapter_s_and_bare_ones_have_none(case: Case) -> None:
    model, members = several(case, 2)
    x, stack = batch(5, 3), ll.stack(members)
    each = [ll.collect(model, m, x)[1] for m in members]
    for ids in ([0, 1, -1, 1, 0], [1, 1, 1, 0, 0], [-1, 0, 0, 0, 0]):
        for given in (ids, torch.tensor([[i] * 3 for i in ids])):
            _, router = ll.collect(model, ll.rows(stack, given), x)
            for path, p in router.items():
                for n, i in enumerate(ids):
                    wanted = torch.zeros_like(p[n]) if i < 0 else each[i][path][n]
                    close(p[n], wanted, 1e-12)


@every
def test_transforms_and_one_graph(case: Case) -> None:
    model, members = several(case, 2)
    x = batch(4)

    def loss(p: ll.Adapter) -> Tensor:
        y, router = ll.collect(model, p, x)
        return y.square().mean() + ll.load_balance(router, top_k=1) + ll.load_balance(router)

    each = [grad(loss)(m) for m in members]
    close(vmap(grad(loss))(ll.stack(members)), ll.stack(each), 1e-10)
    close(ll.grad(loss)(members[0]), each[0], 1e-10)
    torch._dynamo.reset()
    step = torch.compile(lambda p: grad(loss)(p), backend="eager", fullgraph=True)
    close(step(members[1]), each[1], 1e-10)


@every
def test_a_bound_model_s_own_call(case: Case) -> None:
    model, (params,) = several(case)
    x, bound = batch(3, 5), ll.bind(model, params)
    before = snapshot(bound)
    y, router = ll.collect(bound, (), x)
    expected, wanted = ll.collect(model, params, x)
    close(y, expected, 1e-12)
    close(router, wanted, 1e-12)
    assert same_state(before, snapshot(bound))

    def loss(m: nn.Module, p: Any) -> Tensor:
        y, router = ll.collect(m, p, x)
        return y.square().mean() + ll.load_balance(router)

    loss(bound, ()).backward()
    found = {name: p.grad for name, p in bound.named_parameters() if p.requires_grad}
    for path, held in ll.grad(lambda p: loss(model, p))(params).items():
        for name, g in held.items():
            if path in params.sites and f"{path}.adapter.0.{name}" in found:
                close(found[f"{path}.adapter.0.{name}"], g, 1e-12)
    assert all(g is not None for g in found.values())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ll.UnsupportedError, match=r"collect: no method .* found lora; call ll.app"):
        ll.collect(ll.bind(model, ll.init(model, ll.LoRAConfig())), (), x)


def test_a_router_learns_to_be_even() -> None:
    model, x = net(), batch(64)
    cfg = ll.MoELoRAConfig(r=2, experts=4, top_k=1)
    trainable, frozen = ll.partition(moved(ll.init(model, cfg), size=2.0))
    optimizer = ll.adamw(0.1)
    state = optimizer.init(trainable)

    def loss(t: ll.Adapter) -> Tensor:
        return ll.load_balance(ll.collect(model, ll.combine(t, frozen), x)[1], top_k=1)

    first = loss(trainable)
    for _ in range(40):
        trainable, state = optimizer.update(ll.grad(loss)(trainable), state, trainable)
    assert first > 1.3
    assert loss(trainable) < 1.1


class Checkpointed(nn.Module):
    """Two layers, run again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        both = lambda x: self.second(self.first(x).tanh())  # noqa: E731
        return checkpoint(both, x, use_reentrant=self.reentrant)


def test_gradient_checkpointing() -> None:
    model, x = seeded(Checkpointed(False)), batch(6)
    params = moved(ll.init(model, ll.MoELoRAConfig(r=2)))

    def loss(m: nn.Module) -> Any:
        def of(p: ll.Adapter) -> Tensor:
            y, router = ll.collect(m, p, x)
            return y.square().sum() + ll.load_balance(router)

        return of

    whole = nn.Sequential(model.first, nn.Tanh(), model.second)
    names = {"first": "0", "second": "2"}
    found = ll.grad(loss(model))(params)
    same = ll.init(whole, ll.MoELoRAConfig(r=2))
    same = ll.Adapter(same.layout, {names[path]: dict(held) for path, held in params.items()})
    wanted = ll.grad(loss(whole))(same)
    for path, held in found.items():
        close(held, wanted[names[path]], 1e-10)
    reentrant = seeded(Checkpointed(True))
    with pytest.raises(
        ll.UnsupportedError, match=r"'first': it is called without a graph .*use_re"
    ):
        ll.collect(reentrant, params, x.requires_grad_())
    with torch.no_grad():
        assert set(ll.collect(reentrant, params, x)[1]) == set(names)


# ----------------------------------------------------------------------------------------- refusals
def test_what_has_no_router_or_several() -> None:
    model, x = net(), batch(3)
    lora, moe = ll.init(model, ll.LoRAConfig()), ll.init(model, ll.MoELoRAConfig(r=2))
    for given, found in ((lora, "found lora"), ((), "found no adapter")):
        with pytest.raises(
            ll.UnsupportedError, match=f"collect: no method .* {found}; call ll.app"
        ):
            ll.collect(model, given, x)
    assert set(ll.collect(model, (lora, moe), x)[1]) == set(moe)
    with pytest.raises(
        ll.UnsupportedError, match=r"'layers.0.up': it is called twice .*two routed"
    ):
        ll.collect(model, (moe, moe), x)
    mixed = ll.mixed(ll.stack([moe, moe]), torch.ones(3, 2))
    with pytest.raises(ll.UnsupportedError, match=r"no one router to collect; call ll\.apply"):
        ll.collect(model, mixed, x)


def test_what_reads_the_weight_underneath_goes_first() -> None:
    model, x = net(), batch(3)
    moe, dora = moved(ll.init(model, ll.MoELoRAConfig(r=2))), ll.init(model, ll.DoRAConfig(r=2))
    message = r"dora reads the layer underneath .* moelora .* no dense equivalent; put it first"
    with pytest.raises(ll.UnsupportedError, match=message):
        ll.apply(model, (moe, dora), x)
    close(ll.apply(model, (dora, moe), x), ll.apply(ll.merged(model, dora), moe, x), 1e-12)
