"""What operations cost on each type of device, and which of two equal forms costs less there.

Costs are in multiply-adds of a matrix product unless an attribute says otherwise. Measure a device
with `python -m benchmarks.measure.costs`, then give it a row in `MEASURED`. On a device without a
row nothing is rearranged for speed: a layer and its phases run as the method writes them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..core.site import Site
from ..core.update_functions import Forms, Work

__all__ = ["CPU", "MEASURED", "Costs", "costs_on", "dense_pays"]


class Costs(NamedTuple):
    """What operations cost on a device.

    Attributes:
        elementwise: reading and writing one number in an elementwise operation.
        copied_weight: writing W' = W + s B A, beyond its product: as much as so many ranks more.
        segment: a product of its own for a segment (segments.py), in units of one row's token.
        member: reading one member's leaves, in the same units.
        copies: so many copies of a row's token, out of the batch or back, cost what an adapter on
            it does.
        band: a product on a band of ranks (bands.py), in units of a row at rank `band_rank`.
        band_member: reading one member's leaves, in the same units.
        band_rank: what reading and writing a row costs besides what its rank does, in ranks.
        block_width: blocks of a diagonal are multiplied together up to so wide, with zeros beside
            the narrow ones: one product of those takes no longer.
        circulant_blocks: up to so many circulant blocks in a row, a sum over them beats a batch of
            tiny complex products.
        butterfly_run: runs of up to so many features are rotated by one product.
    """

    elementwise: float
    copied_weight: int
    segment: int
    member: int
    copies: int
    band: int
    band_member: int
    band_rank: int
    block_width: int
    circulant_blocks: int
    butterfly_run: int

    def of(self, work: Work) -> float:
        """What the work costs on this device."""
        return work.multiply_adds + self.elementwise * work.passes


CPU = Costs(
    elementwise=20,
    copied_weight=16,  # at 512 to 2,048 tokens, ranks 8 and 64
    segment=60,
    member=3,
    copies=3,  # at 1 to 16 tokens a row
    band=20,  # this and the next two at ranks 4 to 64, 64 rows a member
    band_member=3,
    band_rank=20,
    block_width=32,
    circulant_blocks=16,
    butterfly_run=128,
)
"""Measured with float32 on x86-64 (2 to 4 threads, torch 2.13)."""

MEASURED = {"cpu": CPU}
"""By torch.device.type."""


def costs_on(device: torch.device) -> Costs | None:
    """A device's numbers; None where nothing was measured."""
    return MEASURED.get(device.type)


_BACKWARD = 3
"""A form that is differentiated costs about as much again for each of its two gradients."""


def dense_pays(forms: bool | Forms, site: Site, tokens: int, device: torch.device) -> bool:
    """Whether x W'^T is the cheaper form for so many rows of x.

    In training both forms are differentiated: W' is built once more, and a gradient of it formed.

    Args:
        forms: what the method's `dense` says, which may be the answer.
        site: the site, whose sizes count.
        tokens: the number of rows of x.
        device: the device of x.
    """
    if isinstance(forms, bool):
        return forms
    costs = costs_on(device)
    if costs is None:
        return False
    by_rows, by_weight = tokens * costs.of(forms.row), costs.of(forms.weight)
    if torch.is_grad_enabled():
        gradient = tokens * site.d_in * site.d_out
        by_rows, by_weight = _BACKWARD * by_rows, (_BACKWARD + 1) * by_weight + gradient
    return by_weight < by_rows
