"""Models with each kind of place, and what they take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import Case
from helpers import normal
from torch import Tensor, nn

import lora_lite_func as ll


class Transposed(nn.Module):
    """A linear layer stored (d_in, d_out), as transformers' Conv1D."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.empty(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """Stacked weights, each expert taking its part of the rows."""

    def __init__(self, count: int, d_in: int, d_out: int, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.proj = nn.Parameter(
            torch.empty(count, *((d_in, d_out) if is_transposed else (d_out, d_in)))
        )

    def forward(self, x: Tensor) -> Tensor:
        count = self.proj.shape[0]
        parts = [
            F.linear(x[e::count], self.proj[e].mT if self.is_transposed else self.proj[e])
            for e in range(count)
        ]
        return torch.cat(parts)


class Mixing(nn.Module):
    """A bare matrix, used twice, and a bare vector."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.empty(n, n))
        self.gain = nn.Parameter(torch.empty(n))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.mix) @ self.mix.mT * self.gain


class Plus(nn.Module):
    """A norm that uses 1 + its weight."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) * (1.0 + self.weight)


class Scaled(nn.Embedding):
    """A look-up that changes ids and rows around nn.Embedding's own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 1) * 3.0


class Own(nn.Embedding):
    """A look-up of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return self.weight[input] * 2.0


def features(*shape: int) -> Tensor:
    return normal(*shape, seed=1)


IDS = torch.tensor([[1, 3, 0], [5, 5, 14]])


def method(case: Case) -> str:
    cfg = case.config(r=4)
    return next(v.name for v in ll.variants().values() if v.config is type(cfg))
