"""Costs by device: what was measured decides there alone, and no output depends on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case, start
from helpers import close, moved, net, normal

import lora_lite_func as ll
from lora_lite_func.core.registry import variant_for
from lora_lite_func.core.update_functions import Forms, Work
from lora_lite_func.kernels import cost
from lora_lite_func.kernels.segments import laid_out

DENSE = [case for case in CASES if variant_for(type(case.config(r=4))).dense is not None]
SITE = ll.Site("0", 64, 64)
FORMS = Forms(Work(100.0), Work(50.0, passes=2.0))


def test_the_cheaper_form_is_taken_where_costs_are_known() -> None:
    cpu, other = torch.device("cpu"), torch.device("mps")
    with torch.no_grad():
        assert cost.dense_pays(FORMS, SITE, 1, cpu)  # 50 + 2 * 20 < 100
        assert not cost.dense_pays(FORMS._replace(weight=Work(50.0, 3.0)), SITE, 1, cpu)
        assert not cost.dense_pays(FORMS, SITE, 10_000, other)
        assert cost.dense_pays(True, SITE, 1, other)  # the method's own answer
    assert not cost.dense_pays(FORMS, SITE, 1, cpu)  # W' has a gradient to be formed


@pytest.mark.parametrize("case", DENSE, ids=repr)
def test_outputs_do_not_depend_on_costs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    params = moved(start(case, model, case.config(r=4)))
    x = normal(300, 16, seed=0)
    with torch.no_grad():
        expected = ll.apply(model, params, x)
        monkeypatch.setattr(cost, "MEASURED", {})
        close(ll.apply(model, params, x), expected, 1e-12)


@pytest.mark.parametrize("in_place", [True, False])
def test_rows_are_neither_repeated_nor_banded_where_nothing_was_measured(
    in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [0, 0, 0, 1, 3, 3, 3, -1]
    arguments: Any = (ids, 4, 2, True, torch.device("cpu"), in_place, [4, 64, 4, 64])
    monkeypatch.setattr(cost, "MEASURED", {})
    segments = laid_out(*arguments).segments
    assert [(s.low, s.high, s.width, s.ranks) for s in segments] == [
        (0, 1, 3, None),
        (1, 2, 1, None),
        (3, 4, 3, None),
    ]
