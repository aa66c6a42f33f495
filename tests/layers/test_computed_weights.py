"""Weights that a hook computes before each call: a start reads what the layer would compute now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import close, same_state, snapshot
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import lora_lite_func as ll

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def _pruned(layer: nn.Linear) -> nn.Module:
    mask = (torch.arange(layer.weight.numel()) % 3 > 0).view_as(layer.weight)
    return prune.custom_from_mask(layer, "weight", mask)


HOOKS: dict[str, Callable[[Any], nn.Module]] = {
    "weight_norm": weight_norm,
    "weight_norm_of_all": lambda layer: weight_norm(layer, dim=None),
    "spectral_norm": spectral_norm,
    "pruned": _pruned,
}
every = pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)


def model_of(hook: Callable[[Any], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(hook(nn.Linear(6, 5))).double().eval()


def loaded(hook: Callable[[Any], nn.Module]) -> nn.Module:
    """A model whose layer still shows the weight it was built with: the checkpoint's comes with
    the first call.
    """
    model = model_of(hook)
    model.load_state_dict({k: 3.0 * v for k, v in model_of(hook, 1).state_dict().items()})
    return model


def matrix_of(model: nn.Module) -> Tensor:
    """The weight that a call multiplies by."""
    bias = model[0].bias  # type: ignore[index]
    with torch.no_grad():
        return (model(torch.eye(6, dtype=torch.float64)) - bias).mT


@every
@pytest.mark.parametrize("make", [model_of, loaded], ids=["new", "loaded"])
def test_starts_read_the_weight_that_the_layer_computes(hook: Any, make: Any) -> None:
    model = make(hook)
    before = snapshot(model)
    norms = ll.init(model, ll.DoRAConfig(r=2))["0", "lora_wnorm2"]
    start = ll.init(model, ll.PiSSAConfig(r=2))["0"]
    assert same_state(before, snapshot(model))
    W = matrix_of(make(hook))
    close(norms, W.square().sum(1), 1e-12)
    U, S, Vh = torch.linalg.svd(W)
    close(8.0 * start["lora_B"] @ start["lora_A"], U[:, :2] * S[:2] @ Vh[:2], 1e-12)


@every
def test_a_cast_model_says_its_dtype_before_its_first_call(hook: Any) -> None:
    model = model_of(hook).to(torch.bfloat16)
    params = ll.init(model, ll.LoRAConfig(r=2))
    assert {t.dtype for t in params["0"].values()} == {torch.bfloat16}
