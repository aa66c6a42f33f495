"""merge_site: a layer's weight and bias with the adapters in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, UnsupportedError
from ..core.shared import expert_axes
from ..core.site import Params
from ..core.stacked import unfolded
from ..core.torch_internals import autocasts
from ..layers.embedding import keeping_padding
from ..layers.kinds import KINDS, matrix, restored
from .attachment import Attachment, is_here
from .checks import check_dense
from .state import tensors_at

__all__ = ["merge_site"]


def merge_site(
    module: Any, attachments: Iterable[Attachment], W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The weight (as it is stored) and the bias of a site, with the adapters in them.

    The sums are taken in float32 at least, and returned in the weight's dtype.

    Raises:
        UnsupportedError: a method has no dense equivalent, or the weight isn't at hand (packed,
            offloaded, on the meta device).
    """
    # Autocast is meant for the layer's call, and merging isn't one.
    if autocasts(W.device.type):
        with torch.autocast(W.device.type, enabled=False):
            return merge_site(module, attachments, W, b)
    dtype = W.dtype
    core = torch.promote_types(dtype, torch.float32)
    # The bias of a norm may have several dimensions.
    start = None if b is None else b.to(core).reshape(-1)
    new, bias = W.to(core), start
    for attachment in attachments:
        check_dense(attachment)
        p = tensors_at(attachment, module)
        if new.is_meta and not all(t.is_meta for t in p.values()):
            raise UnsupportedError(
                f"{attachment.site.path!r} ({type(module).__name__}): its weight is on the meta "
                f"device, so there are no values to merge into; load the model's weights first"
            )
        M, moved = _dense(attachment, p, matrix(new, attachment.site), bias)
        M = restored(M, new, attachment.site)
        here = is_here(attachment, p)
        if here is not None:
            M = torch.where(here, M, new)
            if moved is not None and moved is not bias:
                moved = torch.where(here, moved, 0.0 if bias is None else bias)
        new, bias = M, moved
    if KINDS[attachment.site.kind].one_hot:
        # The bias goes into every row of the table, as the entries of a one-hot vector sum to 1.
        if bias is not None:
            table = matrix(new, attachment.site) + bias[:, None]
            new, bias = restored(table, new, attachment.site), None
        new = keeping_padding(module, W, new)
    if bias is start or bias is None:
        return new.to(dtype), b
    shape = bias.shape
    if b is not None:
        shape = b.shape
    elif attachment.site.d_in == 1:
        shape = W.shape
    return new.to(dtype), bias.reshape(shape).to(dtype)


def _dense(
    attachment: Attachment, p: Params, M: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The variant's dense equivalent on (d_out, d_in), or on each matrix of a stack."""
    weight: Any = attachment.variant.weight
    p, site = unfolded(p, attachment.site)
    if not site.num_experts:
        return _checked(attachment, weight(attachment.cfg, p, site, M, b), M)
    return torch.func.vmap(
        lambda p, M: _checked(attachment, weight(attachment.cfg, p, site, M, None), M)[0],
        in_dims=(expert_axes(p, attachment.shared), 0),
    )(dict(p), M), b


def _checked(attachment: Attachment, made: Any, M: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a variant's `weight` gave, checked to be a valid dense equivalent.

    Raises:
        ConfigError: it has another type or shape.
        UnsupportedError: it has a bias where there can be none.
    """
    where, size = f"{attachment.site.path!r}: {attachment.variant.name}", M.shape[:1]
    if not isinstance(made, tuple) or len(made) != 2:
        raise ConfigError(f"{where}.weight gave {type(made).__name__}, expected (W', b')")
    for name, new, shape in (("W'", made[0], M.shape), ("b'", made[1], size)):
        if (new is not None or name == "W'") and (
            not isinstance(new, Tensor) or new.shape != shape
        ):
            found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ConfigError(f"{where}.weight gave {found} for {name} {tuple(shape)}")
    if made[1] is not None and KINDS[attachment.site.kind].bare:
        raise UnsupportedError(
            f"{where} moves a bias, which a bare parameter hasn't; choose other parameters (a "
            f"method that always moves one says in its `sites` what it can adapt)"
        )
    return made
