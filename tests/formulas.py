"""The harness of the oracles: formulas written densely by hand, beside `ll.merge`, `ll.apply`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import close, moved, normal
from linear_layers import layer
from torch import Tensor

import lora_lite_func as ll

Dense = tuple[Tensor, Tensor | None]
Oracle = Callable[[Any, Tensor, Tensor | None, Any], Dense]


def oracles(rows: list[Any]) -> Callable[..., Callable[[Oracle], Oracle]]:
    """The decorator that adds a formula to these rows of a test."""

    def oracle(
        config: ll.AdapterConfig, d_in: int = 16, d_out: int = 24, **more: Any
    ) -> Callable[[Oracle], Oracle]:
        """A row: the formula below is what `config` does to a layer of these sizes."""

        def row(f: Oracle) -> Oracle:
            settings = ",".join(f"{k}={v}" for k, v in more.items())
            name = f"{f.__name__[1:]}-{d_out}x{d_in}{settings and '-' + settings}"
            rows.append(pytest.param(f, config, d_in, d_out, id=name))
            return f

        return row

    return oracle


def check_formula(
    formula: Oracle, cfg: ll.AdapterConfig, d_in: int, d_out: int, bias: bool
) -> None:
    """The weight that `ll.merge` makes, and the output of `ll.apply`, are the formula's."""
    model = layer(bias, d_in, d_out).eval()
    params = moved(ll.init(model, cfg, seed=7), size=0.3)
    W, b = formula(params[""], model.weight.detach(), model.bias.detach() if bias else None, cfg)
    assert (W - model.weight).abs().max() > 1e-3 or not isinstance(b, type(model.bias))
    merged = ll.merge(model, params)
    close(merged["weight"], W, 1e-10)
    assert ("bias" in merged) == (
        (b is not None and (not bias or not torch.equal(b, model.bias))) or "bias" in merged
    )
    if "bias" in merged:
        close(merged["bias"], b, 1e-10)
    x = normal(2, 5, d_in, seed=1)
    y = x @ W.mT if b is None else x @ W.mT + b
    close(ll.apply(model, params, x), y, 1e-10)


def blockdiag(blocks: Any) -> Tensor:
    return torch.block_diag(*blocks)


def skew(q: Tensor, b: int) -> Tensor:
    """Entry by entry: the strict upper triangle, row by row, and its negative below."""
    Q = torch.zeros(b, b, dtype=q.dtype)
    entries = iter(q)
    for i in range(b):
        for j in range(i + 1, b):
            Q[i, j] = next(entries)
            Q[j, i] = -Q[i, j]
    return Q


def cayley(Q: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1."""
    eye = torch.eye(len(Q), dtype=Q.dtype)
    return (eye + Q) @ torch.linalg.inv(eye - Q)
