"""EVA's shared-out ranks and directions beside PEFT's own, on a model whose inputs have spectra of
unlike decay.

PEFT takes the mean out of the inputs, as `center` does. Its `whiten` divides by the roots of
singular values, which grow with the number of tokens; ours makes unit size, and isn't compared.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from helpers import close, normal
from torch import Tensor, nn

import lora_lite_func as ll

peft = pytest.importorskip("peft")

WIDTH, RANK = 24, 4
DECAYS = {"flat": 0.75, "middle": 0.55, "steep": 0.4, "steeper": 0.3}
"""By which each of a layer's directions is weaker than the one before: flat ones spread their
variance over many.
"""

LAYERS = (*DECAYS, "twin")


class Beside(nn.Module):
    """Layers that each read features of their own, and one that reads the same as `flat`."""

    def __init__(self) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        for i, (name, decay) in enumerate(DECAYS.items()):
            basis, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=gen))
            sizes = decay ** torch.arange(WIDTH)
            self.register_buffer(f"mix_{name}", sizes[:, None] * basis)
            self.add_module(name, nn.Linear(WIDTH, 6 + i))
        self.twin = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.get_submodule(name)(self.read(x, name)) for name in LAYERS], -1)

    def read(self, x: Tensor, name: str) -> Tensor:
        """What comes to a layer, (rows, width)."""
        own = "flat" if name == "twin" else name
        i = list(DECAYS).index(own)
        return x[:, i] @ self.get_buffer(f"mix_{own}") + i


def batch() -> Tensor:
    """(rows, layers, width): enough rows that no two directions are of one size by chance."""
    return normal(600, len(DECAYS), WIDTH, seed=1, dtype=torch.float32)


def theirs(model: nn.Module, x: Tensor, **eva: Any) -> Any:
    """PEFT's model. It sums up batches until directions stand still, so one batch comes twice."""
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=8,
        target_modules=list(LAYERS),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(use_label_mask=False, **eva),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        made = peft.get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)
        how = {
            "prepare_model_inputs_fn": None,
            "prepare_layer_inputs_fn": None,
            "show_progress_bar": False,
        }
        peft.initialize_lora_eva_weights(made, [{"x": x}], **how)
    return made


@pytest.mark.parametrize("rho", [1.0, 2.0, 3.0])
def test_ranks_directions_and_strengths_are_pefts(rho: float) -> None:
    model, x = Beside().eval(), batch()
    made = theirs(model, x, rho=rho)
    cfg = ll.EVAConfig(
        r=RANK, alpha=8, rho=rho, center=True, target_names=(rf"^({'|'.join(LAYERS)})$",)
    )
    params = ll.init(model, cfg, calibration_data=[x])
    layers = {path: made.base_model.model.get_submodule(path) for path in LAYERS}
    ranks = {path: layer.r["default"] for path, layer in layers.items() if hasattr(layer, "lora_A")}
    assert ranks == {path: len(held["lora_A"]) for path, held in params.items()}
    assert sum(ranks.values()) == RANK * len(layers)
    assert (len(set(ranks.values())) > 1) == (rho > 1)
    for path in ranks:
        A, other = params[path]["lora_A"], layers[path].lora_A["default"].weight.detach()
        close(A.mT @ A, other.mT @ other, 5e-3)  # one subspace
        found, best = (
            ((model.read(x, path) - model.read(x, path).mean(0)) @ t.mT).square().sum().item()
            for t in (other, A)
        )
        assert 1 - 1e-5 < found / best < 1 + 1e-5
        assert abs(params.layout.sites[path].scale - layers[path].scaling["default"]) < 1e-6
