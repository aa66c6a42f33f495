"""Every method on layers with one feature on a side, such as a gate or a value head."""

from __future__ import annotations

import pytest
import torch
from cases import CALIBRATED, CASES, Case, start
from helpers import close, leaves, moved
from torch import Tensor, nn

import lora_lite_func as ll

LINEAR = [case for case in (*CASES, *CALIBRATED) if case.linear]


class Narrow(nn.Module):
    """One layer, under the path that the cases' data expects."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        up = nn.Linear(d_in, d_out, dtype=torch.float64)
        self.layers = nn.ModuleList([nn.ModuleDict({"up": up})])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0]["up"](x)


@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (4, 1), (1, 4)])
@pytest.mark.parametrize("case", LINEAR, ids=repr)
def test_one_feature(case: Case, d_in: int, d_out: int) -> None:
    torch.manual_seed(0)
    model = Narrow(d_in, d_out).eval()
    x = torch.randn(5, d_in, dtype=torch.float64)
    try:
        params = start(case, model, case.config(r=1))
    except ll.LoraLiteError:
        return  # refused with a reason: laws say which
    assert all(t.isfinite().all() for t in leaves(params))
    if case.identity is not None:
        close(ll.apply(model, params, x), model(x), 1e-13)
    changed = moved(params)
    if params.layout.variant.weight is not None:
        close(ll.merged(model, changed)(x), ll.apply(model, changed, x), 1e-10)
