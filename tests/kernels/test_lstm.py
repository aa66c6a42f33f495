"""An LSTM that goes through a sequence from both ends, beside torch's."""

from __future__ import annotations

import torch
from helpers import close
from torch import Tensor, nn
from torch.func import grad, vmap

from lora_lite_func.kernels.lstm import both_ways


def test_it_is_torch_s_layer() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(5, 3, bidirectional=True).double()
    x = torch.randn(7, 2, 5, dtype=torch.float64)

    def of_both(name: str) -> Tensor:
        both = [getattr(layer, f"{name}_l0"), getattr(layer, f"{name}_l0_reverse")]
        return torch.stack(both).detach()

    b = of_both("bias_ih") + of_both("bias_hh")
    W_x, W_h = of_both("weight_ih"), of_both("weight_hh")
    expected = layer(x)[0]
    for i in range(2):
        close(both_ways(x[:, i], W_x, W_h, b), expected[:, i], 1e-12)
    close(vmap(lambda one: both_ways(one, W_x, W_h, b), 1, 1)(x), expected, 1e-12)
    expected.square().sum().backward()
    found = grad(lambda W: sum(both_ways(x[:, i], W_x, W, b).square().sum() for i in (0, 1)))(W_h)
    close(found, torch.stack([layer.weight_hh_l0.grad, layer.weight_hh_l0_reverse.grad]), 1e-12)
