"""Tree algebra: partition and combine, scale, project, cast, counts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from ..core.adapter import ABSENT, Adapter, keys, leaves, members_of, rebuild, replace
from ..core.config import AdapterConfig, real
from ..core.errors import ConfigError, StructureError, UnsupportedError, short_repr
from ..core.layout import SCALING
from ..core.site import Site

Tree = TypeVar("Tree")

__all__ = [
    "cast",
    "check_adapter",
    "check_named",
    "check_same_method",
    "check_same_sites",
    "combine",
    "every_adapter",
    "map_adapters",
    "num_params",
    "other_settings",
    "partition",
    "project",
    "scale",
    "summary",
]


@overload
def partition(
    params: Adapter, keep: Callable[[str, str], bool] | None = None
) -> tuple[Adapter, Adapter]: ...
@overload
def partition(
    params: Tree, keep: Callable[[str, str], bool] | None = None
) -> tuple[Tree, Tree]: ...
def partition(params: Any, keep: Callable[[str, str], bool] | None = None) -> Any:
    """Two adapters of the same sites, (trainable, frozen): each leaf is in one and absent (no leaf
    at all) in the other.

    `ll.grad(lambda t: loss(ll.apply(model, ll.combine(t, frozen), x)))(trainable)`

    Args:
        params: what to split: an adapter, or a tuple, list or dict of them, which give two of the
            same.
        keep: (path, lora_name) -> whether the leaf goes first, asked once per leaf; by default what
            the method calls trainable.

    Raises:
        StructureError: not an Adapter, nor a tuple, list or dict of them.
    """
    halves: list[tuple[Adapter, Adapter]] = []

    def split(adapter: Adapter) -> Adapter:
        halves.append(_partition(adapter, keep))
        return halves[-1][0]

    first = map_adapters(split, params, "partition")
    rest = iter(halves)
    return first, map_adapters(lambda _: next(rest)[1], params, "partition")


def _partition(params: Adapter, keep: Callable[[str, str], bool] | None) -> tuple[Adapter, Adapter]:
    """(trainable, frozen) of one adapter."""
    rule = keep or (lambda path, name: params.layout.specs[path][name].trainable)
    first = [bool(rule(path, name)) for path, name in keys(params)]
    flat = list(leaves(params))
    return (
        rebuild(
            params.layout, [t if here else ABSENT for t, here in zip(flat, first, strict=True)]
        ),
        rebuild(
            params.layout, [ABSENT if here else t for t, here in zip(flat, first, strict=True)]
        ),
    )


@overload
def combine(*parts: Adapter) -> Adapter: ...
@overload
def combine(*parts: Tree) -> Tree: ...
def combine(*parts: Any) -> Any:
    """The parts of a partition put together again: each leaf from the one part that has it.

    Args:
        *parts: adapters, or tuples, lists or dicts of them, all alike.

    Raises:
        StructureError: no parts, parts of different adapters, or a leaf in several or in none.
    """
    if not parts:
        raise StructureError("combine: expected the parts of an adapter, found none")
    return map_adapters(_combine, parts[0], "combine", *parts[1:])


def _combine(*parts: Adapter) -> Adapter:
    """One adapter of its parts."""
    first = parts[0]
    for other in parts:
        _same_layout(first, other, "combine")
    data: dict[str, dict[str, Any]] = {}
    for path, names in first.layout.names.items():
        data[path] = {}
        for name in names:
            present = [
                part._data[path][name] for part in parts if part._data[path][name] is not ABSENT
            ]
            if len(present) != 1:
                raise StructureError(
                    f"combine: {path!r} {name} is in {len(present)} of the {len(parts)} parts, "
                    f"expected one"
                )
            data[path][name] = present[0]
    return replace(first, data)


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
    if any(leaf is ABSENT for leaf in leaves(params)):
        raise StructureError(
            "scale: this is one part of a partition; scale the whole, ll.combine(trainable, frozen)"
        )
    if isinstance(strength, Tensor) and strength.ndim:
        count = members_of(params, "scale by a strength per member of a stack")
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

        # a member's own scale is no part of the method's tensors
        own = {name: t for name, t in tensors.items() if name != SCALING}
        changed = {
            **tensors,
            **(one(own) if not layout.sites[path].num_experts else torch.func.vmap(one)(own)),
        }
        # a wide strength widens a 0-dim tensor
        return {name: changed[name].to(t.dtype) for name, t in tensors.items()}

    return replace(params, {path: scaled(path, tensors) for path, tensors in params._data.items()})


def check_named(made: Any, known: Collection[str], where: str, whose: str) -> Mapping[str, Tensor]:
    """What a method made, tensors under names that it has; it may leave some out.

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
    if any(leaf is ABSENT for leaf in leaves(params)):
        raise StructureError(
            "project: this is one part of a partition; project the whole, ll.combine(trainable, "
            "frozen)"
        )

    def nearest(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        where = f"site {path!r}: {layout.variant.name}.project"
        made = constrained(layout.config, tensors)
        return {**tensors, **check_named(made, tensors, where, "the adapter has")}

    return replace(params, {path: nearest(path, tensors) for path, tensors in params._data.items()})


def cast(params: Adapter, dtype: torch.dtype) -> Adapter:
    """The floating leaves in another dtype; those that a method keeps in float32 at least stay so.

    Raises:
        StructureError: not an Adapter, or not a floating dtype of 16 bits or more.
    """
    check_adapter(params, "cast")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
        raise StructureError(f"cast: expected a floating dtype, found {dtype!r}")
    specs = params.layout.specs

    def leaf(path: str, name: str, t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        at_least = specs[path][name].dtype
        return t.to(dtype if at_least is None else torch.promote_types(dtype, at_least))

    return replace(
        params,
        {path: {n: leaf(path, n, t) for n, t in ts.items()} for path, ts in params._data.items()},
    )


def num_params(params: Adapter, *, trainable_only: bool = True) -> int:
    """How many numbers the adapter holds (a stack counts all its members).

    Raises:
        StructureError: not an Adapter.
    """
    check_adapter(params, "num_params")
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


def check_adapter(params: Any, what: str) -> None:
    """Refuse anything that isn't an Adapter.

    Raises:
        StructureError: it isn't one; the message says what was found.
    """
    if not isinstance(params, Adapter):
        raise StructureError(f"{what}: expected an Adapter, found {type(params).__name__}")


def map_adapters(f: Callable[..., Any], params: Any, what: str, *others: Any) -> Any:
    """f of each adapter in a tree (and of the adapters that stand there in other trees), as a tree
    of the same form.

    Args:
        f: (adapter, *those of the others) -> anything.
        params: an Adapter, or a tuple, list or dict of them, nested as `ll.apply` takes them.
        what: the verb, for messages.
        *others: trees of the same form.

    Raises:
        StructureError: a tree holds something else or nothing, or the trees differ in form.
    """
    if isinstance(params, Adapter):
        for other in others:
            check_adapter(other, what)
        return f(params, *others)
    if isinstance(params, (tuple, list, Mapping)) and not params:
        raise StructureError(
            f"{what}: expected an Adapter, found {type(params).__name__}, and that empty"
        )
    if isinstance(params, (tuple, list)):
        for other in others:
            if not isinstance(other, (tuple, list)) or len(other) != len(params):
                raise _other_form(what, f"{len(params)} adapters", other)
        made = [
            map_adapters(f, each, what, *rest) for each, *rest in zip(params, *others, strict=True)
        ]
        return tuple(made) if isinstance(params, tuple) else made
    if isinstance(params, Mapping):
        for other in others:
            if not isinstance(other, Mapping) or other.keys() != params.keys():
                raise _other_form(what, f"a dict of {', '.join(map(str, params))}", other)
        return {
            name: map_adapters(f, each, what, *(other[name] for other in others))
            for name, each in params.items()
        }
    raise StructureError(
        f"{what}: expected an Adapter, found {type(params).__name__}; or a tuple, list or dict of "
        f"Adapters"
    )


def _other_form(what: str, expected: str, found: Any) -> StructureError:
    shown = type(found).__name__
    if isinstance(found, (tuple, list, Mapping)) and not isinstance(found, Adapter):
        shown = f"{shown} of {len(found)}"
    return StructureError(f"{what}: expected {expected} as in the first, found {shown}")


def every_adapter(params: Any, what: str) -> list[Adapter]:
    """The adapters in a tree, in order.

    Raises:
        StructureError: the tree holds something else, or no adapter.
    """
    found: list[Adapter] = []
    map_adapters(found.append, params, what)
    return found


def _same_layout(a: Adapter, b: Adapter, what: str) -> None:
    """Refuse two adapters whose static data differ, naming the first difference."""
    check_same_method(a, b, what)
    if a.layout == b.layout:
        return
    check_same_sites(a.sites, b.sites, what)
    raise other_settings(a.config, b.config, what)


def check_same_method(a: Any, b: Any, what: str) -> None:
    """Refuse what isn't two adapters of one method.

    Raises:
        StructureError: it isn't.
    """
    check_adapter(a, what)
    check_adapter(b, what)
    if a.layout.variant.name != b.layout.variant.name:
        raise StructureError(
            f"{what} is {b.layout.variant.name!r}, the first {a.layout.variant.name!r}: one "
            f"method at a time"
        )


def check_same_sites(first: Mapping[str, Site], other: Mapping[str, Site], what: str) -> None:
    """Refuse two adapters' sites that differ.

    Raises:
        StructureError: they do; the message names the first difference.
    """
    for path in sorted(first.keys() ^ other.keys()):
        raise StructureError(
            f"{what}: site {path!r} is in {'the first' if path in first else 'the other'} alone"
        )
    for path, site in first.items():
        if site != other[path]:
            raise StructureError(
                f"{what} differs at {path!r}: {_differing(other[path], site)}, the first "
                f"{_differing(site, other[path])}"
            )


def other_settings(first: AdapterConfig, other: AdapterConfig, what: str) -> StructureError:
    """The refusal of two adapters whose configs differ."""
    return StructureError(
        f"{what} has other settings: {_differing(other, first)}, the first "
        f"{_differing(first, other)}"
    )


def _differing(one: Any, other: Any) -> str:
    """The fields that take part in equality and differ, with the values of `one`."""
    fields = [
        f.name
        for f in dataclasses.fields(one)
        if f.compare and getattr(one, f.name) != getattr(other, f.name)
    ]
    return ", ".join(f"{name}={getattr(one, name)!r}" for name in fields)
