"""ll.penalty: the sum over sites and experts, its gradient, and what has none."""

from __future__ import annotations

import pytest
import torch
from helpers import close, moved, net
from torch import nn

import lora_lite_func as ll


def by_hand(held: ll.Adapter, beta: float, gamma: float) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for p in held.values():
        A, B, eye = p["lora_A"], p["lora_B"], torch.eye(3, dtype=torch.float64)
        total = total + beta * (p["lora_d"] ** 2).sum()
        total = total + gamma * (((B.mT @ B - eye) ** 2).sum().sqrt())
        total = total + gamma * (((A @ A.mT - eye) ** 2).sum().sqrt())
    return total


def test_it_is_the_sum_over_sites_and_has_gradients() -> None:
    params = moved(ll.init(net(), ll.KaSAConfig(r=3, beta=0.2, gamma=0.3)))
    close(ll.penalty(params), by_hand(params, 0.2, 0.3), 1e-12)
    grads = ll.grad(ll.penalty)(params)
    assert all(grads[path][f"lora_{name}"].any() for path in params for name in "ABd")
    several = [params, moved(params, 2)]
    loop = torch.stack([ll.penalty(p) for p in several])
    close(torch.func.vmap(ll.penalty)(ll.stack(several)), loop, 1e-12)


def test_experts_each_have_their_own() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 6, 4, dtype=torch.float64))

    config = ll.KaSAConfig(r=3, target_parameters="up$", beta=0.2, gamma=0.3)
    params = moved(ll.init(Experts(), config))
    each = [{"up": {name: t[i] for name, t in params["up"].items()}} for i in range(2)]
    close(ll.penalty(params), sum(by_hand(p, 0.2, 0.3) for p in each), 1e-12)


def test_what_has_none_is_refused() -> None:
    with pytest.raises(ll.UnsupportedError, match="lora adds nothing to the loss"):
        ll.penalty(ll.init(net(), ll.LoRAConfig()))
    with pytest.raises(ll.StructureError, match="penalty: expected an Adapter, found dict"):
        ll.penalty({})
    part = ll.partition(ll.init(net(), ll.KaSAConfig(r=3)))[0]
    with pytest.raises(ll.StructureError, match="penalty: this is one part of a partition"):
        ll.penalty(part)
    with pytest.raises(ll.ConfigError, match=r"KaSAConfig\.beta: expected at least 0"):
        ll.KaSAConfig(beta=-1.0)


def test_it_is_the_same_whatever_surrounds_it() -> None:
    params = moved(ll.init(net(dtype=torch.float32), ll.MonteCLoRAConfig(r=2)))
    value = ll.penalty(params)
    with torch.device("meta"):
        assert torch.equal(ll.penalty(params), value)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(ll.penalty(params), value)
    finally:
        torch.set_default_dtype(before)
    torch._dynamo.reset()
    compiled = torch.compile(lambda p: ll.penalty(p), backend="eager", fullgraph=True)
    close(compiled(params), value, 1e-6)
    torch._dynamo.reset()
