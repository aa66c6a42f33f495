"""Plain linear layers, without and with an adapter, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from helpers import moved, net, normal
from torch import Tensor, nn

import lora_lite_func as ll


def layer(bias: bool = True, d_in: int = 16, d_out: int = 24) -> nn.Linear:
    """A linear layer with seeded weights, float64."""
    gen = torch.Generator().manual_seed(0)
    made = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for t in made.parameters():
            t.copy_(torch.randn(t.shape, generator=gen, dtype=torch.float64) * 0.3)
    return made


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(*shape, 16, seed=3, dtype=dtype)


def wet(p: float = 0.5, **config: Any) -> tuple[nn.Module, ll.Adapter]:
    model = net(bias=True).train()
    return model, moved(ll.init(model, ll.LoRAConfig(r=4, dropout=p, **config)))
