"""Inputs of every sort: adapters refuse what their layer refuses, and take or name the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case, start
from helpers import close, moved, normal
from torch import Tensor, nn

import lora_lite_func as ll

LINEAR = [case for case in CASES if case.linear]
every = pytest.mark.parametrize("case", LINEAR, ids=repr)
VERBS: tuple[Callable[[Any, Any, Any], Any], ...] = (
    ll.apply,
    lambda model, params, x: ll.bind(model, params)(x),
    lambda model, params, x: ll.prepared(model, params)(x),
)


class One(nn.Module):
    """A layer of 16 features, under the path that the cases' data expects."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(16, 16, bias=bias)})])

    def forward(self, x: Any) -> Any:
        return self.layers[0]["up"](x)


def model_of(bias: bool = True) -> One:
    torch.manual_seed(0)
    return One(bias)


def features(*shape: int) -> Tensor:
    return normal(*shape, seed=1, dtype=torch.float32)


REFUSED: dict[str, Callable[[], Any]] = {
    "4 x 4": lambda: features(4, 4),
    "16 x 1": lambda: features(16, 1),
    "2 x 2 x 4": lambda: features(2, 2, 4),
    "3 x 1": lambda: features(3, 1),
    "no dimension": lambda: features(),
    "no features": lambda: features(2, 0),
    "complex": lambda: features(3, 16).to(torch.complex64),
    "whole numbers": lambda: features(3, 16).long(),
    "8 bits": lambda: features(3, 16).to(torch.float8_e4m3fn),
    "double": lambda: features(3, 16).double(),
    "a list": lambda: [0.5] * 16,
    "nothing": lambda: None,
}


@every
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_the_layer_refuses_is_refused(
    case: Case, graph: bool, make: Callable[[], Any]
) -> None:
    model = model_of()
    params, x = start(case, model, case.config(r=4)), make()
    with torch.set_grad_enabled(graph):
        with pytest.raises((RuntimeError, TypeError)) as refused:
            model(x)
        for verb in VERBS:
            with pytest.raises(type(refused.value), match=r".*"):
                verb(model, params, x)


TAKEN: dict[str, Callable[[], Tensor]] = {
    "one dimension": lambda: features(16),
    "no rows": lambda: features(0, 16),
    "no tokens": lambda: features(2, 0, 16),
    "transposed": lambda: features(16, 5).mT,
    "strided": lambda: features(5, 32)[:, ::2],
    "expanded rows": lambda: features(1, 16).expand(5, 16),
    "expanded features": lambda: features(4, 1).expand(4, 16),
    "channels last": lambda: features(2, 3, 4, 16).to(memory_format=torch.channels_last),
    "six dimensions": lambda: features(1, 2, 1, 2, 1, 16),
    "a view that wants a gradient": lambda: features(3, 4, 16).requires_grad_()[:, 1],
    "negated": lambda: features(3, 16).to(torch.complex64).conj().imag,
}


@every
@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN)
def test_what_the_layer_takes_is_taken(case: Case, make: Callable[[], Tensor]) -> None:
    model, x = model_of().train(not case.noise), make()
    params = moved(start(case, model, case.config(r=4)))
    expected = ll.apply(model, params, x.detach().contiguous().clone().reshape(-1, 16))
    for verb in VERBS:
        y = verb(model, params, x)
        assert y.shape == x.shape
        close(y.reshape(-1, 16), expected, 2e-5)


# ------------------------------------------------------------------------------------------- jagged
def jagged(**fields: Any) -> Tensor:
    return torch.nested.nested_tensor(
        [features(3, 16), features(5, 16)], layout=torch.jagged, **fields
    )


@every
@pytest.mark.parametrize("bias", [True, False])
def test_a_jagged_input_is_that_of_its_tokens(case: Case, bias: bool) -> None:
    model, x = model_of(bias).train(not case.noise), jagged(requires_grad=True)
    params = moved(start(case, model, case.config(r=4)))
    whole = x.detach().values().requires_grad_()
    for verb in VERBS:
        y = verb(model, params, x)
        assert y.offsets().equal(x.offsets())
        close(y.values(), verb(model, params, whole), 2e-5)
    y = ll.apply(model, params, x)
    (to_jagged,) = torch.autograd.grad(y.values().square().sum(), x)
    (to_tokens,) = torch.autograd.grad(ll.apply(model, params, whole).square().sum(), whole)
    close(to_jagged.values(), to_tokens, 2e-5)


def test_a_jagged_layer_is_one_with_its_neighbours() -> None:
    model, x = model_of(), jagged()
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    assert (ll.apply(model, params, x) + x).values().shape == (8, 16)  # the same lengths


def test_jagged_ids() -> None:
    model = nn.Sequential(nn.Embedding(9, 4))
    cfg = ll.LoRAConfig(r=2, target_kinds=("embedding",), exclude_names=())
    params = moved(ll.init(model, cfg))
    ids = torch.nested.nested_tensor([torch.arange(3), torch.arange(5)], layout=torch.jagged)
    close(ll.apply(model, params, ids).values(), ll.apply(model, params, ids.values()), 1e-6)


def test_rows_of_a_jagged_batch_are_refused() -> None:
    model = model_of()
    stacked = ll.stack([ll.init(model, ll.LoRAConfig(r=2)) for _ in range(2)])
    with pytest.raises(
        ll.UnsupportedError, match=r"'layers.0.up': a jagged .* can't be told apart"
    ):
        ll.apply(model, ll.rows(stacked, [0, 1]), jagged())


@pytest.mark.filterwarnings("ignore:.*PyTorch API of nested tensors.*:UserWarning")
def test_other_nested_inputs_are_refused() -> None:
    model = model_of()
    params = ll.init(model, ll.DoRAConfig(r=2))
    x = torch.nested.nested_tensor([features(3, 16), features(5, 16)])
    with pytest.raises(ll.UnsupportedError, match=r"layout torch.jagged, .* found layout"):
        ll.apply(model, params, x)


def test_sparse_inputs_are_taken_or_refused_by_name() -> None:
    model, x = model_of(), features(3, 16).relu().to_sparse()
    close(ll.apply(model, ll.init(model, ll.BitFitConfig()), x), model(x), 1e-6)
    with pytest.raises(ll.UnsupportedError, match=r"oft can't take an input of layout .*to_dense"):
        ll.apply(model, ll.init(model, ll.OFTConfig(block_size=4)), x)
