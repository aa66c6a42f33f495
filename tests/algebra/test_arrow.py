"""ll.arrow: trained adapters as experts, their directions, and general knowledge taken out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import close, moved, net, normal
from torch import Tensor, nn

import lora_lite_func as ll

MODEL = net()


def trained(seed: int, r: int = 4, **fields: Any) -> ll.Adapter:
    return moved(ll.init(MODEL, ll.LoRAConfig(r=r, **fields), seed=seed), seed)


def update(params: ll.Adapter, path: str) -> Tensor:
    """What merging adds to a weight."""
    return ll.merge(MODEL, params)[f"{path}.weight"] - MODEL.get_submodule(path).weight


def batch() -> Tensor:
    return normal(7, 16, seed=1)


def by_hand(updates: list[dict[str, Tensor]], x: Tensor, top_k: int, t: float) -> Tensor:
    """The model whose layers route each token by the top right singular vectors of dense updates,
    one token after another.
    """

    def routed(path: str) -> Any:
        each = [u[path] for u in updates]
        directions = torch.stack([torch.linalg.svd(u)[2][0] for u in each])

        def add(layer: nn.Module, args: Any, y: Tensor) -> Tensor:
            rows = []
            for token in args[0]:
                like = (directions @ token).abs()
                best = like.argsort(descending=True)[:top_k]
                g = (like[best] / t).softmax(0)
                rows.append(sum(w * each[e] @ token for w, e in zip(g, best, strict=True)))
            return y + torch.stack(rows)

        return MODEL.get_submodule(path).register_forward_hook(add)

    handles = [routed(path) for path in updates[0]]
    try:
        return MODEL(x)
    finally:
        for handle in handles:
            handle.remove()


def dense(params: ll.Adapter) -> dict[str, Tensor]:
    return {path: update(params, path).detach() for path in params}


def test_tokens_go_to_the_experts_whose_directions_they_lie_along() -> None:
    experts = [trained(0), trained(1, r=2, alpha=3.0), trained(2, rank_pattern={"up": 8})]
    for top_k, t in ((1, 1.0), (2, 0.3), (3, 1.0)):
        made = ll.arrow(experts, top_k=top_k, temperature=t)
        wanted = by_hand([dense(p) for p in experts], batch(), top_k, t)
        close(ll.apply(MODEL, made, batch()), wanted, 1e-10)
    assert made.sites["layers.0.up"].r == 8
    assert made.sites["layers.0.down"].r == 4


def test_other_methods_with_factors_are_experts_too() -> None:
    experts = [moved(ll.init(MODEL, cfg(r=3))) for cfg in (ll.PiSSAConfig, ll.LoRAXSConfig)]
    made = ll.arrow(experts, top_k=2)
    close(
        ll.apply(MODEL, made, batch()), by_hand([dense(p) for p in experts], batch(), 2, 1.0), 1e-9
    )


def test_general_updates_are_taken_out_exactly() -> None:
    experts, general = [trained(0), trained(1, r=2)], [trained(5, r=3, alpha=2.0), trained(6)]
    made = ll.arrow(experts, top_k=1, general=general)
    mean = {p: (update(general[0], p) + update(general[1], p)) / 2 for p in made}
    purified = [{p: u - mean[p] for p, u in dense(e).items()} for e in experts]
    close(ll.apply(MODEL, made, batch()), by_hand(purified, batch(), 1, 1.0), 1e-9)


def test_peft_s_subtraction_of_factors_is_another_thing() -> None:
    experts, general = [trained(0), trained(1, alpha=3.0)], [trained(5), trained(6)]
    made = ll.arrow(experts, top_k=1, general=general, subtract="factors")
    purified: list[dict[str, Tensor]] = []
    for e in experts:
        purified.append({})
        for path, held in e.items():
            A, B = (sum(g[path][n] for g in general) / 2 for n in ("lora_A", "lora_B"))
            s = e.sites[path].scaling
            purified[-1][path] = s * (held["lora_B"] - B) @ (held["lora_A"] - A)
    close(ll.apply(MODEL, made, batch()), by_hand(purified, batch(), 1, 1.0), 1e-9)
    exact = ll.apply(MODEL, ll.arrow(experts, top_k=1, general=general), batch())
    assert (ll.apply(MODEL, made, batch()) - exact).abs().max() > 1e-3


def test_an_expert_that_does_nothing_has_no_direction() -> None:
    made = ll.arrow([trained(0), ll.init(MODEL, ll.LoRAConfig(r=4))], top_k=1)
    for held in made.values():
        assert not held["lora_proto"][1].any()
        close(held["lora_proto"][0].norm(), torch.ones((), dtype=torch.float64), 1e-12)


def test_it_is_pure_and_mapped_and_keeps_to_its_dtype() -> None:
    experts, x = [trained(0), trained(1)], batch()
    stacks = [ll.stack([e, moved(e, 9)]) for e in experts]
    each = [ll.arrow([s[i] for s in stacks], top_k=1) for i in range(2)]
    ys = torch.func.vmap(lambda *p: ll.apply(MODEL, ll.arrow(p, top_k=1), x))(*stacks)
    close(ys, torch.stack([ll.apply(MODEL, a, x) for a in each]), 1e-10)
    half = ll.arrow([ll.cast(e, torch.bfloat16) for e in experts], top_k=1)
    assert {t.dtype for held in half.values() for t in held.values()} == {torch.bfloat16}
    slope = torch.func.grad(
        lambda e: ll.apply(MODEL, ll.arrow([e, experts[1]], top_k=2), x).square().sum()
    )(experts[0])
    assert all(t.isfinite().all() and t.any() for held in slope.values() for t in held.values())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ll.arrow([]), ll.StructureError, "expected at least one adapter"),
        (lambda: ll.arrow(trained(0)), ll.StructureError, "a sequence of adapters, found Adapter"),
        (
            lambda: ll.arrow([trained(0), trained(1, target_names="up")]),
            ll.StructureError,
            "'layers.0.down' isn't adapted by both number 0 and number 1",
        ),
        (
            lambda: ll.arrow([trained(0)], top_k=1, general=[trained(1, target_names="up")]),
            ll.StructureError,
            "'layers.0.down' isn't adapted by both number 0 and general number 0",
        ),
        (lambda: ll.arrow([trained(0)] * 2), ll.ConfigError, "top_k: expected 1 to experts=2, fou"),
        (
            lambda: ll.arrow([trained(0)], top_k=1, temperature=0.0),
            ll.ConfigError,
            "temperature: expected more than 0",
        ),
        (
            lambda: ll.arrow([ll.init(MODEL, ll.HiRAConfig(r=2))], top_k=1),
            ll.UnsupportedError,
            "hira's update isn't a product of two factors",
        ),
        (
            lambda: ll.arrow([trained(0)], top_k=1, general=[trained(1, r=2)], subtract="factors"),
            ll.UnsupportedError,
            "of another rank, found ranks 2, 4; take subtract='update'",
        ),
        (
            lambda: ll.arrow([trained(0)], subtract="A"),  # type: ignore[arg-type]
            ll.StructureError,
            "subtract: expected 'update' or 'factors', found 'A'",
        ),
        (
            lambda: ll.arrow([ll.stack([trained(0), trained(1)])]),
            ll.StructureError,
            "a stack of 2 adapters",
        ),
        (
            lambda: ll.arrow(
                [ll.init(nn.Embedding(4, 4), ll.LoRAConfig(r=2, target_kinds="embedding"))]
            ),
            ll.UnsupportedError,
            "is of kind 'embedding'; tokens are routed at linear layers alone",
        ),
    ],
)
def test_what_cannot_be_experts_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
