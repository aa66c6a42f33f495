"""What methods add to the loss, of their tensors alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, UnsupportedError, short_repr
from ..core.shared import each_site, expert_axes
from ..core.stacked import OF_MEMBERS, PRESENT
from .alike import check_adapter, check_whole

__all__ = ["penalty"]


def penalty(params: Any) -> Tensor:
    """What the adapter's method adds to the loss, with the weights that its config has: the sum
    over all sites, (). Pure; of a stack's members, `torch.func.vmap(ll.penalty)(stack)`.

    Raises:
        UnsupportedError: the method adds nothing.
        StructureError: not an Adapter, or a part of a partition.
        ConfigError: a method's `penalty` gives something else than a number.
    """
    check_adapter(params, "penalty")
    layout = params.layout
    if layout.variant.penalty is None:
        raise UnsupportedError(f"{layout.variant.name} adds nothing to the loss")
    check_whole(params, "penalty", "give")
    total: Any = 0.0
    for path, tensors in each_site(layout.shared, params._data):
        site = layout.sites[path]
        own = {name: t for name, t in tensors.items() if name not in OF_MEMBERS}
        one = partial(_asked, layout.variant.penalty, layout.config, site=site)
        if site.num_experts:
            axes = expert_axes(own, layout.shared.get(path, ()))
            added = torch.func.vmap(one, in_dims=(axes,))(own).sum()
        else:
            added = one(own)
        total = total + (added * tensors[PRESENT] if PRESENT in tensors else added)
    return total if isinstance(total, Tensor) else torch.as_tensor(total)


def _asked(penalty: Any, cfg: Any, own: Any, *, site: Any) -> Tensor:
    made = penalty(cfg, own, site)
    if not isinstance(made, Tensor) or made.shape != ():
        raise ConfigError(
            f"site {site.path!r}: penalty gave {short_repr(made)}, expected a tensor ()"
        )
    return made
