"""What `Variant.additive` says: the update is the same for every weight."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case
from helpers import close, moved, net

import lora_lite_func as ll


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_additive_method_adds_the_same_to_any_weight(case: Case) -> None:
    model = net()
    extra = {} if case.calibration is None else case.calibration(model)
    params = moved(ll.init(model, case.config(r=4), **extra))
    variant = params.layout.variant
    if not variant.additive:
        return
    path, site = next(iter(params.sites.items()))
    held = {name: t.double() for name, t in params[path].items()}
    weights = [f(site.d_out, site.d_in, dtype=torch.float64) for f in (torch.zeros, torch.randn)]
    updates = [variant.weight(params.config, held, site, W, None)[0] - W for W in weights]
    close(updates[1], updates[0], 1e-9)
    assert updates[0].abs().max() > 0
