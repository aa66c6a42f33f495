"""Parameters, buffers and inputs of classes of their own, and with attributes that somebody has set
on them: a call finds them as they are, in every mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from helpers import close, leaves, moved
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import lora_lite_func as ll


class Curved(nn.Parameter):
    """A parameter that knows more than its values, as one on a manifold does."""

    curvature: float

    def __new__(cls, values: Tensor, curvature: float = 1.0) -> Curved:
        made: Curved = super().__new__(cls, values)
        made.curvature = curvature
        return made


class Named(Tensor):
    """A tensor with a name for a class, which operations keep."""


class Reading(nn.Module):
    """Reads the attributes of its parameters and buffers, adapted ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = Curved(torch.randn(4, 4), 2.0)
        self.free, self.gain = Curved(torch.randn(4), 3.0), nn.Parameter(torch.ones(4))
        self.shift = nn.Buffer(torch.ones(4))
        self.plain = torch.ones(4)
        for t in (self.gain, self.shift, self.plain, self.first.weight):
            t.times = 2.0  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        free, second = self.free, self.second.weight
        assert isinstance(free, Curved)
        assert isinstance(second, Curved)
        noted: Any = (self.gain, self.shift, self.plain, self.first.weight)
        times = sum(t.times for t in noted)
        return (self.first(x) * second.curvature + self.second(x)) * free.curvature * times


ADAPTED = {
    "around": lambda: ll.LoRAConfig(r=2, target_names=("^first$",)),
    "both": lambda: ll.DoRAConfig(r=2),
    "dense": lambda: ll.HiRAConfig(r=2),
    "weight": lambda: ll.LoRAConfig(r=2, target_parameters=(r"second\.weight$",)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ADAPTED)
def test_attributes_are_found_in_every_mode(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model, x = Reading().train(training), torch.randn(3, 4)
    params = moved(ll.init(model, ADAPTED[name]()))
    dense = ll.merged(model, params)
    assert isinstance(dense.second.weight, Curved)
    y, f = dense(x), ll.functional(model, params)
    calls: dict[str, Callable[[], Any]] = {
        "apply": lambda: ll.apply(model, params, x),
        "no graph": lambda: torch.no_grad()(lambda: ll.apply(model, params, x))(),
        "bind": lambda: ll.bind(model, params).train(training)(x),
        "functional": lambda: f(params, x),
        "jvp": lambda: jvp(lambda p: ll.apply(model, p, x), (params,), (params,))[0],
    }
    for mode, call in calls.items():
        assert (call() - y).abs().max() < 1e-4, mode
    grad(lambda p: ll.apply(model, p, x).sum())(params)
    assert ll.check(model, params, x).ok
    model.gain.times = 5.0  # type: ignore[attr-defined]
    assert torch.equal(f(params, x), ll.apply(model, params, x))


def test_attributes_under_vmap() -> None:
    torch.manual_seed(0)
    model, x = Reading().eval(), torch.randn(3, 4)
    params = moved(ll.init(model, ADAPTED["around"]()))
    several = vmap(lambda p: ll.apply(model, p, x))(ll.stack([params, params]))
    close(several[1], ll.apply(model, params, x), 1e-5)
    both = moved(ll.init(model, ADAPTED["both"]()))
    close(
        vmap(lambda p: ll.apply(model, p, x))(ll.stack([both, both]))[1],
        ll.apply(model, both, x),
        1e-5,
    )


@pytest.mark.parametrize(
    "cfg",
    [
        ll.LoRAConfig(r=2),
        ll.DoRAConfig(r=2),
        ll.HiRAConfig(r=2),
        ll.PEANuTConfig(r=2),
        ll.FRoDConfig(),
        ll.KaSAConfig(r=2),
        ll.OFTConfig(block_size=2),
    ],
    ids=lambda cfg: type(cfg).__name__,
)
@pytest.mark.parametrize("kind", [Named, Curved])
def test_weights_and_inputs_of_a_class_of_their_own(cfg: ll.AdapterConfig, kind: Any) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    odd, x = copy.deepcopy(plain), torch.randn(3, 4)
    for layer in (odd[0], odd[2]):
        for name, t in list(layer._parameters.items()):
            assert t is not None
            values = t.detach()
            layer._parameters[name] = (
                Curved(values) if kind is Curved else nn.Parameter(values.as_subclass(Named))
            )
    params = moved(ll.init(plain, cfg))
    start = ll.init(odd, cfg)
    assert all(type(t) is Tensor for t in leaves(start))
    close(start, ll.init(plain, cfg), 1e-6)
    y, zero = ll.apply(plain, params, x), pytree.tree_map(torch.zeros_like, params)
    given = x.as_subclass(Named)
    for made in (
        ll.apply(odd, params, given),
        ll.bind(odd, params)(given),
        ll.prepared(odd, params)(given),
        ll.apply(odd, ll.rows(ll.stack([params, params]), [0, 1, 0]), given),
        vmap(lambda p: ll.apply(odd, p, given))(ll.stack([params, params]))[1],
        jvp(lambda p: ll.apply(odd, p, given), (params,), (zero,))[0],
        ll.merged(odd, params)(x),
    ):
        close(made.as_subclass(Tensor), y, 1e-4)


def test_one_seed_gives_one_mask_for_an_input_of_any_class() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)).train(), torch.randn(6, 4)
    params = moved(ll.init(model, ll.LoRAConfig(r=2, dropout=0.5)))
    made = []
    for given in (x, x.as_subclass(Named), Curved(x)):
        torch.manual_seed(3)
        made.append(ll.apply(model, params, given).as_subclass(Tensor))
    close(made[0], made[1], 1e-6)
    close(made[0], made[2], 1e-6)


@pytest.mark.parametrize("odd", [False, True])
def test_check_tells_a_tied_parameter_of_any_class_from_a_read_one(odd: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = (nn.Linear(4, 4, bias=False) for _ in range(2))
            if odd:
                self.layer.weight = Curved(torch.randn(4, 4)).requires_grad_(False)
            self.head.weight = self.layer.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.layer(x))
            return y

    model = Tied()
    params = moved(ll.init(model, ll.LoRAConfig(r=2, target_names=("^layer$",))))
    report = ll.check(model, params, torch.randn(2, 4))
    assert report.ok
    assert not report.reads
