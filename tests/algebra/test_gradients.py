"""ll.value_and_grad and ll.grad: torch.func's numbers, on fresh leaves where nothing is around."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from helpers import Checkpointed, Net, close, in_threads, leaves, moved, net, normal
from torch import Tensor

import lora_lite_func as ll

X = normal(6, 16)


def situation(config: ll.AdapterConfig | None = None) -> tuple[Net, ll.Adapter]:
    model = net(depth=1)
    return model, moved(ll.init(model, config or ll.LoRAConfig(r=4)))


@pytest.mark.parametrize(
    "config",
    [
        ll.LoRAConfig(r=4),
        ll.PiSSAConfig(r=4),
        ll.SHiRAConfig(r=2),
        ll.FourierFTConfig(n_frequency=24),
    ],
    ids=lambda c: type(c).__name__,
)
def test_it_gives_what_torch_func_gives(config: ll.AdapterConfig) -> None:
    model, params = situation(config)
    t, frozen = ll.partition(params)

    def loss(t: Any, x: Tensor, power: int = 2) -> Tensor:
        return ll.apply(model, ll.combine(t, frozen), x).pow(power).mean()

    wanted, value = torch.func.grad_and_value(loss)(t, X, power=4)
    found = ll.value_and_grad(loss)(t, X, power=4)
    close(found, (value, wanted), 1e-12)
    close(ll.grad(loss)(t, X, power=4), wanted, 1e-12)
    both = ll.grad(loss, argnums=(0, -1))(t, X)
    assert isinstance(both, tuple)
    close(both, torch.func.grad(loss, argnums=(0, 1))(t, X), 1e-12)
    assert all(not g.requires_grad and g.grad_fn is None for g in leaves((found, both)))
    assert all(not p.requires_grad and p.grad is None for p in (X, *leaves(params)))
    assert all(p.grad is None for p in model.parameters())


def test_frozen_and_integer_leaves_get_zeros_and_absent_ones_stay_absent() -> None:
    model, params = situation(ll.PiSSAConfig(r=4))
    grads = ll.grad(lambda p: ll.apply(model, p, X).sum())(params)
    for path, tensors in grads.items():
        for name, g in tensors.items():
            assert bool(g.any()) == params.layout.specs[path][name].trainable
    part, _ = ll.partition(params, lambda path, name: name == "lora_B")
    assert [
        *ll.to_dict(ll.grad(lambda t: t["layers.0.up", "lora_B"].sum())(part))["layers.0.up"]
    ] == ["lora_B"]
    tree = {"w": torch.ones(3), "i": torch.arange(3), "b": torch.tensor([True])}
    grads = ll.grad(lambda tree: (tree["w"] * tree["i"]).sum())(tree)
    assert grads["w"].tolist() == [0.0, 1.0, 2.0]
    assert grads["i"].dtype == torch.int64
    assert not grads["i"].any()
    assert grads["b"].dtype == torch.bool
    (inside,) = torch.func.vmap(lambda w: ll.grad(lambda t: t[0].square().sum())((w, tree["i"])))(
        torch.ones(2, 3)
    )[:1]
    assert inside.tolist() == [[2.0] * 3] * 2


def test_aux_is_given_along_without_a_graph() -> None:
    model, params = situation()

    def loss(p: ll.Adapter) -> tuple[Tensor, dict[str, Any]]:
        y = ll.apply(model, p, X)
        return y.square().mean(), {"y": y, "n": 3}

    (value, aux), grads = ll.value_and_grad(loss, has_aux=True)(params)
    assert aux["n"] == 3
    assert not aux["y"].requires_grad
    assert not value.requires_grad
    again, same = ll.grad(loss, has_aux=True)(params)
    close((again, same["y"]), (grads, aux["y"]), 0.0)
    close(grads, torch.func.grad(lambda p: loss(p)[0])(params), 1e-12)


def test_a_loss_that_knows_nothing_of_the_parameters_has_zero_gradients() -> None:
    for t in leaves(ll.grad(lambda p: torch.tensor(2.0))(situation()[1])):
        assert not t.any()


def test_tuples_and_dicts_of_adapters() -> None:
    model, params = situation()
    pair = {"a": params, "b": (moved(ll.init(model, ll.IA3Config())),)}

    def loss(p: Any) -> Tensor:
        return ll.apply(model, p, X).square().mean()

    close(ll.grad(loss)(pair), torch.func.grad(loss)(pair), 1e-12)


# ---------------------------------------------------------------------------- what may be around it
def test_inside_transforms_it_is_torch_funcs() -> None:
    model, params = situation()
    v = pytree.tree_map(torch.ones_like, params)

    def loss(p: Any) -> Tensor:
        return ll.apply(model, p, X).square().mean()

    ours, theirs = ll.grad(loss), torch.func.grad(loss)
    close(torch.func.jvp(ours, (params,), (v,)), torch.func.jvp(theirs, (params,), (v,)), 1e-12)
    stacked = ll.stack([params, params])
    close(torch.func.vmap(ours)(stacked), torch.func.vmap(theirs)(stacked), 1e-12)

    def norm(gradient: Any) -> Any:
        return lambda p: torch.stack([g.square().sum() for g in leaves(gradient(p))]).sum()

    wanted = torch.func.grad(norm(theirs))(params)
    for outer in (ll.grad, torch.func.grad):
        close(outer(norm(ours))(params), wanted, 1e-12)
    # what the inner loss takes from outside is followed by an outer ll.grad, too
    close(
        ll.grad(lambda p: ll.grad(lambda c: c * loss(p))(torch.ones((), dtype=X.dtype)))(params),
        theirs(params),
        1e-12,
    )


def test_arguments_that_require_gradients_give_gradients_that_have_graphs() -> None:
    model, params = situation()
    live = pytree.tree_map(lambda t: t.clone().requires_grad_(), params)

    def loss(p: Any, x: Tensor) -> Tensor:
        return ll.apply(model, p, x).square().mean()

    grads = ll.grad(loss)(live, X)
    torch.stack([g.square().sum() for g in leaves(grads)]).sum().backward()
    wanted = torch.func.grad(
        lambda p: torch.stack([g.square().sum() for g in leaves(torch.func.grad(loss)(p, X))]).sum()
    )(params)
    close([t.grad for t in leaves(live)], leaves(wanted), 1e-12)
    with torch.no_grad():
        assert not any(g.requires_grad for g in leaves(ll.grad(loss)(live, X)))


def test_under_no_grad_and_inference_mode() -> None:
    model, params = situation()

    def loss(p: Any) -> Tensor:
        return ll.apply(model, p, X).square().mean()

    wanted = torch.func.grad(loss)(params)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            close(ll.grad(loss)(params), wanted, 1e-12)
            close(ll.grad(loss)(pytree.tree_map(torch.clone, params)), wanted, 1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_under_gradient_checkpointing(dropout: float) -> None:
    plain = net(depth=1).train()
    model = Checkpointed(plain)
    config = ll.LoRAConfig(r=4, dropout=dropout)
    params, bare = (moved(ll.init(m, config)) for m in (model, plain))
    grads = {}
    for name, m, p in (("checkpointed", model, params), ("plain", plain, bare)):
        torch.manual_seed(3)
        grads[name] = ll.grad(lambda p, m=m: ll.apply(m, p, X).square().mean())(p)
    # the same draws, by other paths
    if dropout:
        assert all(bool(g.any()) for g in leaves(grads["checkpointed"]))
    else:
        for path, tensors in grads["plain"].items():
            close(
                leaves(ll.grad(lambda p: ll.apply(model, p, X).square().mean())(params)),
                leaves(
                    torch.func.grad(
                        lambda p: ll.apply(plain, _renamed(p, bare), X).square().mean()
                    )(params)
                ),
                1e-12,
            )
            assert set(tensors) == set(grads["checkpointed"][f"inner.{path}"])


def _renamed(p: ll.Adapter, like: ll.Adapter) -> ll.Adapter:
    return ll.from_dict(
        {path.removeprefix("inner."): ts for path, ts in ll.to_dict(p).items()}, like
    )


def test_in_threads() -> None:
    model, params = situation()
    several = [moved(params, seed) for seed in range(4)]

    def loss(p: Any) -> Tensor:
        return ll.apply(model, p, X).square().mean()

    wanted = [torch.func.grad(loss)(p) for p in several]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            grads = ll.grad(loss)(several[i])
            wrong.extend(
                i
                for a, b in zip(leaves(grads), leaves(wanted[i]), strict=True)
                if (a - b).abs().max() > 1e-12
            )

    in_threads(4, work)
    assert not wrong


def test_one_full_graph() -> None:
    torch._dynamo.reset()
    model, params = situation()
    step = torch.compile(
        lambda p, x: ll.value_and_grad(lambda p: ll.apply(model, p, x).square().mean())(p),
        backend="eager",
        fullgraph=True,
    )
    wanted, value = torch.func.grad_and_value(lambda p: ll.apply(model, p, X).square().mean())(
        params
    )
    close(step(params, X), (value, wanted), 1e-12)
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: ll.grad(lambda p: 3.0)(p), r"real scalar tensor \(\), found float"),
        (lambda p: ll.grad(lambda p: X)(p), r"found torch.float64 of shape \(6, 16\)"),
        (lambda p: ll.grad(lambda p: (X.sum(), 1))(p), r"found tuple; with has_aux=True"),
        (lambda p: ll.grad(lambda p: X.sum(), has_aux=True)(p), r"to give \(value, aux\)"),
        (lambda p: ll.grad(lambda p: X.sum(), argnums=1)(p), "arguments 0 to 0, found 1"),
        (lambda p: ll.grad(lambda p: X.sum(), argnums=())(p), r"expected one number.*found \(\)"),
        (lambda p: ll.grad(lambda p: X.sum(), argnums=(0, -1))(p), "several that differ"),
        (lambda p: ll.grad(lambda p: X.sum())({"p": p, "c": 2.0}), "found 2.0; take it from"),
    ],
)
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ll.StructureError, match=message):
        call(situation()[1])
