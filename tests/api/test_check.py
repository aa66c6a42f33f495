"""The dry run: what it says is what the model does, and it writes on nothing."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import moved, net, same_state, snapshot
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_lite_func as ll

LORA = ll.LoRAConfig(r=4)


def x16(*batch: int) -> Tensor:
    return torch.randn(
        *(batch or (5,)), 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


class Program(nn.Module):
    """Layers that are called, or whose weight alone is used, as a list of steps says."""

    def __init__(self, steps: list[tuple[str, int]], count: int = 4) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(nn.Linear(16, 16, dtype=torch.float64) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for how, i in self.steps:
            layer: Any = self.layers[i]
            if how == "call":
                x = x + layer(x)
            elif how == "forward":
                x = x - layer.forward(x)
            elif how == "read":
                x = torch.tanh(F.linear(x, layer.weight, layer.bias))
            elif how == "bare":
                x = torch.tanh(F.linear(x, layer._parameters["weight"]))
            elif how == "matmul":
                x = x @ layer.weight.T
            else:
                x = x.to(layer.weight.dtype) * layer.weight.shape[0] / 16
        return x


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["call", "forward", "read", "matmul", "look"]), st.integers(0, 3)
        ),
        max_size=6,
    ),
    st.booleans(),
)
def test_it_tells_what_the_model_does(steps: list[tuple[str, int]], training: bool) -> None:
    model, x = Program(steps).train(training), x16()
    params = moved(ll.init(model, LORA))
    before = snapshot(model)
    found = ll.check(model, params, x)
    assert same_state(before, snapshot(model))
    assert dict(found.calls) == {
        f"layers.{i}": sum(j == i and how in ("call", "forward") for how, j in steps)
        for i in range(4)
    }
    assert set(found.weights) == {f"layers.{i}" for how, i in steps if how in ("read", "matmul")}
    assert not found.reads  # what is read without a call is the adapted weight
    assert found.uncalled == tuple(
        path for path, n in found.calls.items() if not n and path not in found.weights
    )
    assert found.repeated == {path: n for path, n in found.calls.items() if n > 1}
    assert found.agrees
    assert found.ok == (not found.uncalled)
    assert all(path in repr(found) for path in [*found.uncalled, *found.repeated, *found.weights])
    config = ll.check(model, LORA, x)
    assert (config.calls, config.reads, config.difference, config.effect) == (
        found.calls,
        found.reads,
        None,
        None,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "cfg",
    [LORA, ll.HRAConfig(r=4), ll.DoRAConfig(r=4), ll.IA3FFConfig(), ll.PiSSAConfig(r=4)],
    ids=lambda c: type(c).__name__,
)
def test_apply_and_merged_agree(cfg: ll.AdapterConfig, dtype: torch.dtype) -> None:
    model, x = net(dtype=dtype), x16().to(dtype)
    start = ll.init(model, cfg)
    found = ll.check(model, moved(start), x)
    assert found.ok
    assert found.difference <= found.tolerance
    assert found.tells == (found.tolerance < found.effect)
    assert found.tells or dtype == torch.bfloat16
    assert found.tells == ("says little" not in repr(found))
    assert "Report: ok\n  4 of 4 sites reached\n  it moves the output by at most" in repr(found)
    assert not ll.check(model, start, x).tells
    several = ll.check(model, (moved(start), ll.init(model, ll.IA3Config())), x)
    assert several.ok
    assert set(several.calls.values()) == {1}


def cosine(self: nn.Linear, x: Tensor) -> Tensor:
    """Not x W^T: a method that adds to the output and one that adds to the weight mean different
    things.
    """
    return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


def test_it_names_the_first_site_where_they_part() -> None:
    model, x = net(), x16()
    model.layers[1].up.forward = types.MethodType(cosine, model.layers[1].up)
    found = ll.check(model, moved(ll.init(model, LORA)), x)
    assert not found.ok
    assert found.parts_at == "layers.1.up"
    assert not found.uncalled
    assert "too much" in repr(found)
    assert "first at 'layers.1.up'" in repr(found)


def test_ties_and_other_names() -> None:
    model = nn.Module()
    model.embed_tokens = nn.Embedding(8, 16)
    model.out = nn.Linear(16, 8, bias=False)
    model.out.weight = model.embed_tokens.weight
    model.first = nn.Linear(16, 16)
    model.again = model.first
    model.forward = lambda ids: model.out(model.again(model.first(model.embed_tokens(ids))))  # type: ignore[method-assign]
    params = moved(ll.init(model, LORA))
    found = ll.check(model, params, torch.tensor([[1, 2, 3]]))
    assert found.tied == {"out": ("embed_tokens.weight",)}
    assert found.shared == {"first": ("again",)}
    assert found.repeated == {"first": 2}
    assert found.ok, repr(found)  # the tie is broken by apply and by merged alike
    assert "'out' is tied to embed_tokens.weight" in repr(found)
    assert ll.merged(model, params).embed_tokens.weight is not ll.merged(model, params).out.weight


def test_an_adapted_weight_counts_as_reached() -> None:
    model, x = nn.MultiheadAttention(16, 4, dtype=torch.float64), x16(1)
    found = ll.check(model, moved(ll.init(model, LORA)), x, x, x)
    assert found.ok
    assert (found.calls, found.weights) == ({"out_proj": 0}, ("out_proj",))


def test_a_bare_weight_that_is_read_is_named() -> None:
    model = Program([("call", 0), ("bare", 1)], count=2)
    found = ll.check(model, moved(ll.init(model, LORA)), x16())
    assert not found.ok
    assert found.uncalled == ("layers.1",)
    assert set(found.reads) == {"layers.1"}
    assert "'layers.1': torch.nn.functional.linear took" in repr(found)
    assert not found.agrees


def test_what_cannot_be_merged_is_told() -> None:
    model, x = net(), x16()
    nn.utils.parametrizations.weight_norm(model.layers[0].up)
    found = ll.check(model, moved(ll.init(model, LORA)), x)
    assert found.ok
    assert found.difference is None
    assert found.effect > 1e-3
    assert "its weight is computed" in found.unmerged
    assert "not compared with merged weights: 'layers.0.up'" in repr(found)


@dataclass
class Output:
    y: Tensor
    extra: tuple[Any, ...] = ()


class Careless(nn.Module):
    """Writes on what it is given, counts, drops out; returns an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.norm = nn.BatchNorm1d(16).double()
        self.drop = nn.Dropout(0.5)
        self.seen = 0

    def forward(self, x: Tensor, *, cache: list[Tensor]) -> Output:
        x += 1.0
        cache.append(x)
        self.seen += 1
        return Output(self.net(self.drop(self.norm(x))), (len(cache), [{"x": x}]))


def test_neither_model_nor_example_nor_random_state_is_touched() -> None:
    model, x, cache = Careless().train(), x16(), []
    params = moved(ll.init(model, LORA))
    before, state, given = snapshot(model), torch.random.get_rng_state(), x.clone()
    found = ll.check(model, params, x, cache=cache)
    assert found.ok, repr(found)
    assert found.difference is not None
    assert same_state(before, snapshot(model))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(x, given)
    assert (cache, model.seen, model.training) == ([], 0, True)


def test_outputs_that_cannot_be_compared() -> None:
    class Name(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16, dtype=torch.float64)

        def forward(self, x: Tensor) -> Any:
            return self.a(x).argmax(-1)

    found = ll.check(Name(), moved(ll.init(Name(), LORA)), x16())
    assert found.ok
    assert "no floating tensor" in repr(found)


def test_it_refuses_what_apply_refuses() -> None:
    model, params = net(), ll.init(net(depth=3), LORA)
    with pytest.raises(ll.StructureError, match=r"no module at site 'layers\.2\.(up|down)'"):
        ll.check(model, params, x16())
    with pytest.raises(ll.TargetError, match="'q_proj' matched none"):
        ll.check(model, ll.LoRAConfig(target_names="q_proj"), x16())
    with pytest.raises(ll.StructureError, match="expected an Adapter"):
        ll.check(model, x16())  # type: ignore[arg-type]
