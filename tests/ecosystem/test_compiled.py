"""Compiled and exported for any size: of the batch, of the tokens, of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import close, moved, net
from torch import Tensor, nn

import lora_lite_func as ll

CONFIGS = {
    "lora": ll.LoRAConfig(r=4),
    "dora": ll.DoRAConfig(r=4),
    "oft": ll.OFTConfig(block_size=4),
    "fourierft": ll.FourierFTConfig(n_frequency=24),
    "loreft": ll.LoReFTConfig(r=2, target_names=r"layers\.\d$"),
    "full": ll.FullConfig(target_parameters=(r"up\.weight$",)),
}


@pytest.fixture(params=CONFIGS)
def cfg(request: pytest.FixtureRequest) -> ll.AdapterConfig:
    """A method's config."""
    torch._dynamo.reset()
    found: ll.AdapterConfig = CONFIGS[request.param]
    return found


def batches(width: int = 16) -> list[Tensor]:
    """Two sizes of (N, T, width)."""
    return [torch.randn(n, t, width, dtype=torch.float64) for n, t in ((2, 5), (3, 7))]


def test_dynamic_shapes(cfg: ll.AdapterConfig) -> None:
    model = net()
    params = moved(ll.init(model, cfg))
    step: Any = torch.compile(
        lambda p, x: ll.apply(model, p, x), fullgraph=True, backend="eager", dynamic=True
    )
    for x in batches():
        close(step(params, x), ll.apply(model, params, x), 1e-12)


@pytest.mark.parametrize(
    "cfg", [ll.DoRAConfig(r=4), ll.BOFTConfig(block_size=4)], ids=lambda cfg: type(cfg).__name__
)
def test_a_method_that_reads_the_layer_with_another_adapter_in(cfg: ll.AdapterConfig) -> None:
    torch._dynamo.reset()
    model, x = net(), batches()[0]
    both = (moved(ll.init(model, ll.LoRAConfig(r=2)), 1), moved(ll.init(model, cfg), 2))
    step: Any = torch.compile(lambda p, x: ll.apply(model, p, x), fullgraph=True, backend="eager")
    close(step(both, x), ll.apply(model, both, x), 1e-12)


def test_models_of_any_width(cfg: ll.AdapterConfig) -> None:
    step: Any = torch.compile(lambda m, p, x: ll.apply(m, p, x), fullgraph=True, backend="eager")
    for width in (16, 24, 32):
        model = net(width=width, inner=width + 8)
        params = moved(ll.init(model, cfg))
        x = batches(width)[0]
        close(step(model, params, x), ll.apply(model, params, x), 1e-12)


def test_a_bound_model_compiles_and_exports_for_any_batch(cfg: ll.AdapterConfig) -> None:
    model = net()
    params = moved(ll.init(model, cfg))
    bound = ll.bind(model, params)
    step: Any = torch.compile(bound, fullgraph=True, backend="eager")
    sizes = (
        {0: torch.export.Dim("n", min=2, max=4096), 1: torch.export.Dim("t", min=2, max=4096)},
    )
    program = torch.export.export(bound, (batches()[0],), dynamic_shapes=sizes).module()
    for x in batches():
        for run in (step, program):
            close(run(x), ll.apply(model, params, x), 1e-12)


class Masked(nn.Module):
    """A model that is told its prompt by an attention mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.inner(x)
        return y


def test_a_compiled_bound_model_knows_its_prompt() -> None:
    torch._dynamo.reset()
    model = Masked()
    params = moved(
        ll.init(model, ll.LoReFTConfig(r=2, first=1, last=1, target_names=r"layers\.\d$"))
    )
    bound = ll.bind(model, params)
    step: Any = torch.compile(bound, fullgraph=True, backend="eager")
    x = batches()[0]
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    expected = ll.apply(model, params, x, attention_mask=mask)
    assert not torch.allclose(expected, ll.apply(model, params, x))
    for _ in range(2):
        close(step(x, attention_mask=mask), expected, 1e-12)
        close(bound(x, attention_mask=mask), expected, 1e-12)
        close(step(x), ll.apply(model, params, x), 1e-12)
