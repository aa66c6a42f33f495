"""Random composed models by every verb, against weights computed by hand."""

from __future__ import annotations

import fuzz_models
import torch


def test_random_models_agree_with_dense_ones() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    right, refused, wrong = fuzz_models.many(300, seed=0)
    torch.set_num_threads(threads)
    assert not wrong, "\n".join(wrong)
    assert right > 5 * refused
