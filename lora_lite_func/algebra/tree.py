"""Tree algebra: scale, project, cast, and counts of an adapter."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter, count_members, replace
from ..core.arguments import flag
from ..core.config import real
from ..core.errors import ConfigError, StructureError, UnsupportedError, short_repr
from ..core.shared import each_site, expert_axes
from ..core.stacked import OF_MEMBERS
from .alike import check_adapter, check_whole

__all__ = ["cast", "check_named", "num_params", "project", "scale", "summary"]


def scale(params: Adapter, strength: float | Tensor) -> Adapter:
    """The adapter at `strength` times its strength: 0 is the base, 1 changes nothing, -1 turns it
    round. Pure, same structure.

    Additive methods scale their update; gates, angles and rotations move along their path from the
    identity.

    Args:
        params: the adapter; a stack is scaled member by member with a tensor of shape (K,).
        strength: a float, or a tensor (differentiable, and fit for vmap).

    Raises:
        UnsupportedError: the method has no such path.
        StructureError: a part of a partition, or a vector of strengths for something that isn't a
            stack of as many adapters.
        ConfigError: a strength that is neither a finite number nor a tensor, or a method's `scale`
            gives something else than its tensors.
    """
    check_adapter(params, "scale")
    real(strength, "scale: strength")
    if isinstance(strength, float) and not math.isfinite(strength):
        raise ConfigError(f"scale: strength: expected a finite number, found {strength}")
    layout = params.layout
    change = layout.variant.scale
    if change is None:
        raise UnsupportedError(
            f"{layout.variant.name} has no `scale` function in its Variant, so its strength "
            f"can't be set"
        )
    check_whole(params, "scale", "scale")
    if isinstance(strength, Tensor) and strength.ndim:
        count = count_members(params, "scale by a strength per member of a stack")
        if tuple(strength.shape) != (count,):
            raise StructureError(
                f"scale: expected one strength or {count}, one per member of the stack, found "
                f"{tuple(strength.shape)}"
            )
        return torch.func.vmap(scale)(params, strength)

    def scaled(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        def one(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
            return check_named(
                change(layout.config, tensors, strength),
                tensors,
                f"site {path!r}: {layout.variant.name}.scale",
                "the adapter has",
            )

        # The method doesn't know the leaves that are a stack's own.
        own = {name: t for name, t in tensors.items() if name not in OF_MEMBERS}
        if layout.sites[path].num_experts:
            shared = layout.shared.get(path, ())
            made = torch.func.vmap(one, in_dims=(expert_axes(own, shared),))(own)
            made = {name: t[0] if name in shared else t for name, t in made.items()}
        else:
            made = one(own)
        # A strength of a wide dtype widens 0-dim tensors.
        return {name: made.get(name, t).to(t.dtype) for name, t in tensors.items()}

    sites = each_site(layout.shared, params._data)
    return replace(params, {path: scaled(path, tensors) for path, tensors in sites})


def check_named(made: Any, known: Collection[str], where: str, whose: str) -> Mapping[str, Tensor]:
    """What a method's function gave, checked to be tensors under names that the method has.

    It may leave names out.

    Args:
        made: what one of its functions gave.
        known: the names.
        where: which function, for messages.
        whose: what has these names, for messages.

    Raises:
        ConfigError: something else than a mapping of names to tensors, or a name that isn't known.
    """
    if not isinstance(made, Mapping) or not all(isinstance(t, Tensor) for t in made.values()):
        raise ConfigError(
            f"{where}: expected a mapping of names to tensors, found {short_repr(made)}"
        )
    odd = [name for name in made if name not in known]
    if odd:
        raise ConfigError(f"{where} gave {short_repr(odd[0])}, {whose} {', '.join(known)}")
    return made


def project(params: Adapter) -> Adapter:
    """The nearest adapter that the method's constraint allows (COFT's bound on rotations); for
    after an optimizer's step. Pure.

    Raises:
        UnsupportedError: the method has no constraint.
        StructureError: not an Adapter, or a part of a partition.
        ConfigError: a method's `project` gives something else than its tensors.
    """
    check_adapter(params, "project")
    layout = params.layout
    constrained = layout.variant.project
    if constrained is None:
        raise UnsupportedError(
            f"{layout.variant.name} has no constraint that its parameters could be projected to"
        )
    check_whole(params, "project", "project")

    def nearest(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        where = f"site {path!r}: {layout.variant.name}.project"
        made = constrained(layout.config, tensors)
        return {**tensors, **check_named(made, tensors, where, "the adapter has")}

    sites = each_site(layout.shared, params._data)
    return replace(params, {path: nearest(path, tensors) for path, tensors in sites})


def cast(params: Adapter, dtype: torch.dtype) -> Adapter:
    """The floating leaves in another dtype; those that a method keeps in float32 at least stay so.

    Raises:
        StructureError: not an Adapter, or not a floating dtype of 16 bits or more.
    """
    check_adapter(params, "cast")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
        raise StructureError(f"cast: expected a floating dtype, found {dtype!r}")
    return params.to(dtype=dtype)


def num_params(params: Adapter, *, trainable_only: bool = True) -> int:
    """How many numbers the adapter holds (a stack counts all its members).

    Raises:
        StructureError: not an Adapter.
    """
    check_adapter(params, "num_params")
    flag(trainable_only, "num_params: trainable_only")
    layout = params.layout
    return sum(
        t.numel()
        for path, ts in params._data.items()
        for n, t in ts.items()
        if isinstance(t, Tensor) and (layout.specs[path][n].trainable or not trainable_only)
    )


def summary(params: Adapter) -> str:
    """The adapter as a table: what `print(params)` shows.

    Raises:
        StructureError: not an Adapter.
    """
    check_adapter(params, "summary")
    return repr(params)
