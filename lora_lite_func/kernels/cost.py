"""Which of two equal forms costs less, by sizes alone: a method's phases beside the frozen product, or one product with W'.

Costs are in multiply-adds of a matrix product. In training both forms are differentiated, and W' has a gradient of its own to be formed.
"""

from __future__ import annotations

import torch

from ..core.site import Site

__all__ = ["PASS", "dense_pays"]

PASS = 20
"""What reading and writing one number in an elementwise operation costs (measured on a CPU; a
memory-bound pass against a product).
"""

# a differentiated form costs about as much again for each of its two gradients; W' is built once
# more for them
_BACKWARD = 3


def dense_pays(site: Site, tokens: int, *, branch: float, build: float) -> bool:
    """Whether x W'^T is the cheaper form for so many rows of x.

    Args:
        site: for its sizes.
        tokens: rows of x.
        branch: what the phases cost per row.
        build: what W' costs.
    """
    beside, whole = tokens * branch, build
    if torch.is_grad_enabled():
        beside, whole = (
            _BACKWARD * beside,
            (_BACKWARD + 1) * whole + tokens * site.d_in * site.d_out,
        )
    return whole < beside
