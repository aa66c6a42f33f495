"""LoRI's mask: the furthest moved entries over all sites, and training that leaves the rest."""

from __future__ import annotations

import pytest
import torch
from helpers import close, moved, net

import lora_lite_func as ll


def test_the_mask_is_the_largest_entries_over_all_sites() -> None:
    first = moved(ll.init(net(), ll.LoRIConfig(r=4)))
    second = ll.masked_by(first, 0.1)
    sizes = torch.cat([held["lora_B"].abs().flatten() for held in first.values()])
    masks = torch.cat([held["lora_mask"].flatten() for held in second.values()])
    assert int(masks.sum()) == int(0.1 * len(sizes))
    assert sizes[masks == 1].min() >= sizes[masks == 0].max()
    for path, held in second.items():
        assert not held["lora_B"].any()
        assert torch.equal(held["lora_A"], first[path]["lora_A"])
    x = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(ll.apply(net(), second, x), net()(x))


def test_masked_entries_have_no_gradient_and_no_part_in_the_output() -> None:
    model, x = net(), torch.randn(3, 16, dtype=torch.float64)
    second = moved(ll.masked_by(moved(ll.init(model, ll.LoRIConfig(r=4))), 0.3))
    grads = ll.grad(lambda p: ll.apply(model, p, x).square().sum())(second)
    for path, held in second.items():
        assert not grads[path]["lora_B"][held["lora_mask"] == 0].any()
    again = ll.masked_by(second, 1.0)  # all entries: those that were masked may move again
    assert all(held["lora_mask"].all() for held in again.values())


def test_two_tasks_hardly_meet() -> None:
    """Their sum as one adapter is the sum of their updates, in two draws' subspaces."""
    model, x = net(), torch.randn(3, 16, dtype=torch.float64)
    one, two = (moved(ll.init(model, ll.LoRIConfig(r=2), seed=i), i) for i in (1, 2))
    A, B = one["layers.0.up"]["lora_A"], two["layers.0.up"]["lora_A"]
    assert not torch.equal(A, B)
    both = ll.combine_adapters([one, two], [1.0, 1.0], "cat")
    close(ll.apply(model, both, x), ll.apply(model, (one, two), x), 1e-12)


@pytest.mark.parametrize("fraction", [0.0, 1.5, -1.0])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ll.ConfigError, match=r"fraction: expected a part in \(0, 1\], found"):
        ll.masked_by(ll.init(net(), ll.LoRIConfig()), fraction)


def test_what_is_no_lori_is_refused() -> None:
    with pytest.raises(ll.StructureError, match=r"adapter of ll\.LoRIConfig, found lora"):
        ll.masked_by(ll.init(net(), ll.LoRAConfig()))
    stack = ll.stack([ll.init(net(), ll.LoRIConfig())] * 2)
    with pytest.raises(ll.StructureError, match=r"take a stack's members \(ll\.unstack\)"):
        ll.masked_by(stack)
