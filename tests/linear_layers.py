"""Plain linear layers with an adapter, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from helpers import moved, net
from torch import Tensor, nn

import lora_lite_func as ll


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(3), dtype=dtype)


def wet(p: float = 0.5, **config: Any) -> tuple[nn.Module, ll.Adapter]:
    model = net(bias=True).train()
    return model, moved(ll.init(model, ll.LoRAConfig(r=4, dropout=p, **config)))
