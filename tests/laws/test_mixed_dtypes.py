"""An adapter whose leaves have several dtypes, as a user's cast or a file may leave it: outputs are
those of the widest, and no product of unlike dtypes fails deep inside.
"""

from __future__ import annotations

import pytest
import torch
from cases import MERGED, Case, start
from helpers import close, moved, net

import lora_lite_func as ll
from lora_lite_func.core.adapter import replace

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
ONE_EACH = {case.name.partition("_")[0]: case for case in reversed(MERGED) if not case.noise}


@pytest.mark.parametrize("case", ONE_EACH.values(), ids=str)
def test_one_leaf_of_a_wider_dtype(case: Case) -> None:
    model = net(dtype=torch.float32)
    params = moved(start(case, model, case.config(r=4)))
    y, path = ll.apply(model, params, X), next(iter(params))
    for name in params.layout.names[path]:
        if params.layout.specs[path][name].dtype is None:
            data = {p: dict(held) for p, held in params.items()}
            data[path][name] = data[path][name].double()
            wider = replace(params, data)
            close(ll.apply(model, wider, X), y, 1e-4)
            close(ll.bind(model, wider)(X), y, 1e-4)
