"""A site's output where each row of the batch, or each token, has a weighted sum of updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.site import Params
from ..core.stacked import unfolded
from ..core.torch_internals import without_autocast
from ..kernels.dropout import dropped
from ..kernels.mixture import Mixture, add_mixture
from .attachment import Attachment
from .rows_activation import mapped

__all__ = ["by_weights", "stacked_factors"]


def by_weights(
    attachment: Attachment,
    mixture: Mixture,
    p: Params,
    layer: Any,
    training: bool,
    inner: Callable[[Tensor], Any],
    x: Tensor,
) -> Tensor:
    """The site's output: the layer's own plus the weighted sum of the members' updates.

    Factor pairs take two products. Other methods run their phase once for each member, on an
    output of zeros, which gives the update alone.

    Args:
        attachment: the method at the site.
        mixture: the weights.
        p: its tensors, each with a leading axis of members.
        layer: what `prepare` may see.
        training: whether to drop out, and whether phases act as in training.
        inner: the layer with the adapters before this one.
        x: (N, ..., d_in), or (N, T, ..., d_in) where tokens have weights.

    Raises:
        StructureError: the leading dimensions aren't those of the weights.
        UnsupportedError: the layer's output isn't a tensor, or routers are to be collected.
    """
    variant, site = attachment.variant, attachment.site
    if attachment.seen is not None:
        raise UnsupportedError(
            f"site {site.path!r}: each token has a weighted sum of several routers' updates, so "
            f"there is no one router to collect; call ll.apply"
        )
    w, y = mixture.at(x, site.path), inner(x)
    if not isinstance(y, Tensor):
        raise UnsupportedError(
            f"site {site.path!r}: its output is a {type(y).__name__}, to which no update can be "
            f"added; leave it out with exclude_names"
        )
    if attachment.dropout and training:
        x = dropped(x, attachment.dropout)
    by_phases = variant.beyond_weight(attachment.cfg, training)
    if variant.low_rank_factors is not None and not by_phases:
        return add_mixture(y, x, *stacked_factors(attachment, p), w)
    assert variant.outputs is not None
    zeros = torch.zeros_like(y)
    for k in range(mixture.members):
        q, at = unfolded({name: t[k] for name, t in p.items()}, site)
        d = None
        if variant.prepare is not None:
            device = next(iter(q.values())).device.type
            d = without_autocast(device, variant.prepare, attachment.cfg, q, at, layer)
        update = variant.outputs(attachment.cfg, q, d, x, zeros, at)
        y = (y + w[..., k : k + 1] * update).to(y.dtype)
    return y


def stacked_factors(attachment: Attachment, p: Params) -> tuple[Tensor, Tensor, float | Tensor]:
    """A (K, r, d_in), B (K, d_out, r) and s, a float or (K,), of a stack's tensors at a site."""
    variant, site = attachment.variant, attachment.site
    assert variant.low_rank_factors is not None
    factors = variant.low_rank_factors

    def one(p: Params) -> tuple[Tensor, Tensor, float | Tensor]:
        return factors(attachment.cfg, *unfolded(p, site))

    made: tuple[Tensor, Tensor, float | Tensor] = one(p) if variant.batched else mapped(one, p)
    return made
