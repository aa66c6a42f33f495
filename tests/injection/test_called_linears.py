"""Factors as linear layers that are called: `ll.bind(model, params, linears=True)`."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import CALIBRATED, CASES, Case, start
from helpers import close, leaves, moved, net, normal
from torch import Tensor, nn

import lora_lite_func as ll

X = normal(3, 5, 16, seed=0)
DORA = ll.DoRAConfig(r=4)


def has_pair(case: Case) -> bool:
    cfg = case.config(r=4)
    variant = next(v for v in ll.variants().values() if v.config is type(cfg))
    return variant.called_outputs is not None and getattr(cfg, "detach_norm", True)


EVERY = CASES + CALIBRATED
PAIRS = [case for case in EVERY if has_pair(case)]
OTHERS = [case for case in EVERY if not has_pair(case)]


def result(bound: nn.Module, x: Tensor = X) -> list[Tensor]:
    """The output and all gradients, parameters by name."""
    x = x.clone().requires_grad_()
    y = bound(x)
    named = {n.removesuffix(".weight"): p for n, p in bound.named_parameters() if p.requires_grad}
    inputs = [x, *(named[name] for name in sorted(named))]
    return [y, *torch.autograd.grad(y.square().sum(), inputs)]


@pytest.mark.parametrize("case", PAIRS, ids=repr)
def test_it_is_what_a_plain_bound_model_is(case: Case) -> None:
    model = net()
    params = start(case, model, case.config(r=4))
    close(ll.bind(model, params, linears=True)(X), ll.apply(model, params, X), 1e-12)
    if case.exact:
        assert torch.equal(ll.bind(model, params, linears=True)(X), model(X))
    params = moved(params)
    called, plain = ll.bind(model, params, linears=True), ll.bind(model, params)
    close(result(called), result(plain), 1e-12)
    back = ll.unbind(called)
    assert isinstance(back, ll.Adapter)
    assert back.layout == params.layout
    assert all(torch.equal(a, b) for a, b in zip(leaves(back), leaves(params), strict=True))
    assert back["layers.0.up"]["lora_B"].data_ptr() == params["layers.0.up"]["lora_B"].data_ptr()
    fresh = ll.bind(model, start(case, model, case.config(r=4)), linears=True)
    fresh.load_state_dict(plain.state_dict())  # names of either kind are taken
    close(fresh(X), plain(X), 1e-12)


@pytest.mark.parametrize("case", OTHERS, ids=repr)
def test_methods_without_a_pair_are_refused(case: Case) -> None:
    model = net()
    params = start(case, model, case.config(r=4))
    name = params.layout.variant.name
    with pytest.raises(ll.UnsupportedError, match=rf"linears=True\): site 'layers.*({name}|DoRA)"):
        ll.bind(model, params, linears=True)


def factors(bound: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in bound.named_modules() if type(m) is nn.Linear and ".lora_" in n}


def test_each_factor_is_called_once_and_is_the_only_linear_layer_with_its_parameter() -> None:
    model = net()
    params = moved(ll.init(model, ll.LoRAConfig(r=4))), moved(ll.init(model, DORA), 2)
    bound = ll.bind(model, params, linears=True)  # DoRA asks what is underneath, which has LoRA in
    seen: list[str] = []
    for name, module in factors(bound).items():
        module.register_forward_hook(lambda module, args, out, name=name: seen.append(name))  # type: ignore[misc]
    close(result(bound), result(ll.bind(model, params)), 1e-12)
    assert sorted(seen) == sorted(factors(bound))
    assert len(seen) == 2 * 2 * len(params[0])
    for module in bound.modules():
        if isinstance(module, nn.Linear):
            assert (
                not any(p.requires_grad for p in module.parameters())
                or module in factors(bound).values()
            )


def test_bound_in_two_steps_it_is_the_same() -> None:
    model = net()
    first, second = moved(ll.init(model, ll.LoRAConfig(r=4))), moved(ll.init(model, DORA), 2)
    twice = ll.bind(ll.bind(model, first, linears=True), second)
    close(twice(X), ll.apply(model, (first, second), X), 1e-12)
    assert len(factors(twice)) == 2 * len(first)
    close(ll.apply(ll.bind(model, first, linears=True), second, X), twice(X), 1e-12)


def test_dropout_frozen_factors_and_other_dtypes() -> None:
    model = net().train()
    params = moved(ll.init(model, ll.LoRAConfig(r=4, dropout=0.5, frozen_A=True)))
    both = [ll.bind(model, params, linears=linears) for linears in (True, False)]
    found = []
    for bound in both:
        torch.manual_seed(0)
        found.append(result(bound))
    close(*found, 1e-12)
    assert not any("lora_A" in name for name, _ in both[0].named_parameters())
    half = ll.bind(net(dtype=torch.bfloat16), ll.cast(params, torch.float32), linears=True).eval()
    assert half(X.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        wide = ll.bind(net(dtype=torch.float32), ll.cast(params, torch.float32), linears=True)
        close(wide.eval()(X.float()).double(), both[1].eval()(X), 0.05)


def test_copies_pickles_and_states() -> None:
    model = net()
    bound = ll.bind(model, moved(ll.init(model, DORA)), linears=True)
    for other in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        close(result(other), result(bound), 1e-12)
        assert list(other.state_dict()) == list(bound.state_dict())
    assert "layers.0.up.adapter.0.lora_A.weight" in bound.state_dict()
    assert "in_features=16, out_features=24" in repr(bound.layers[0].up)


class Special(nn.Linear):
    """A layer with methods and properties of its own, which call their bases'."""

    @property
    def size(self) -> int:
        return self.in_features * self.out_features

    def named(self) -> str:
        return type(self).__name__ + super().extra_repr()[:2]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "size"] = torch.tensor(self.size)

    def half_of(self) -> nn.Module:
        return self


def test_a_site_keeps_what_its_class_has() -> None:
    model = nn.Sequential(Special(4, 3))
    layer: Any = ll.bind(model, ll.init(model, ll.LoRAConfig(r=2)), linears=True)[0]
    assert not isinstance(layer, nn.Linear)
    assert (layer.size, layer.named(), layer.in_features) == (12, "Specialin", 4)
    assert layer.half_of() is layer
    assert layer.state_dict()["size"] == 12


class Reads(nn.Module):
    """It reads a layer's weight: its dtype, or all of it."""

    def __init__(self, use: bool) -> None:
        super().__init__()
        self.layer, self.use = nn.Linear(4, 4), use

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.layer.weight.dtype)
        return nn.functional.linear(x, self.layer.weight) if self.use else self.layer(x)


PLACES: dict[str, tuple[nn.Module, ll.AdapterConfig]] = {
    "kind 'embedding'": (
        nn.ModuleDict({"a": nn.Embedding(5, 4)}),
        ll.LoRAConfig(r=2, target_kinds=("embedding",)),
    ),
    "kind 'conv'": (
        nn.ModuleDict({"a": nn.Conv1d(4, 4, 3)}),
        ll.LoRAConfig(r=2, target_kinds=("conv",)),
    ),
    "kind 'parameter'": (
        nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)}),
        ll.LoRAConfig(r=2, target_parameters=("in_proj_weight",)),
    ),
    "without calling the layer": (
        nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)}),
        ll.LoRAConfig(r=2),
    ),
}


@pytest.mark.parametrize("says", PLACES)
def test_layers_that_are_not_called_are_refused(says: str) -> None:
    model, cfg = PLACES[says]
    with pytest.raises(ll.UnsupportedError, match=rf"site 'a.*{says}.*exclude_names"):
        ll.bind(model, ll.init(model, cfg), linears=True)


def test_a_weight_that_is_used_uncalled_is_refused() -> None:
    x = torch.randn(2, 4)
    for use in (False, True):
        model = Reads(use)
        bound = ll.bind(model, ll.init(model, ll.LoRAConfig(r=2)), linears=True)
        if not use:
            bound(x).sum().backward()
            continue
        with pytest.raises(ll.UnsupportedError, match=r"'layer'.*without calling"):
            bound(x)


def test_rows_of_a_stack_are_refused() -> None:
    model = net()
    stack = ll.stack([ll.init(model, ll.LoRAConfig(r=2)) for _ in range(2)])
    with pytest.raises(ll.UnsupportedError, match=r"each row of a batch.*ll\.unstack"):
        ll.bind(model, ll.rows(stack, [0, 1]), linears=True)
