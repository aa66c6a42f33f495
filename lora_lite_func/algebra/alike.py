"""Trees of adapters walked together, and adapters that must be alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..core.absent import ABSENT
from ..core.adapter import Adapter, leaves
from ..core.config import AdapterConfig
from ..core.errors import StructureError
from ..core.layout import Layout
from ..core.site import Site

__all__ = [
    "check_adapter",
    "check_method",
    "check_same_layout",
    "check_same_method",
    "check_same_sites",
    "check_whole",
    "every_adapter",
    "map_adapters",
    "other_method",
    "other_settings",
]


def check_adapter(params: Any, what: str) -> None:
    """Refuse anything that isn't an Adapter.

    Raises:
        StructureError: it isn't one; the message says what was found.
    """
    if not isinstance(params, Adapter):
        raise StructureError(f"{what}: expected an Adapter, found {type(params).__name__}")


def check_method(params: Any, method: str, config: str, what: str) -> None:
    """Refuse anything that isn't an adapter of one method.

    Args:
        params: the adapter.
        method: the method's name.
        config: its config's, for the message.
        what: what it was given to, for the message.

    Raises:
        StructureError: it isn't one; the message says what was found.
    """
    found = params.layout.variant.name if isinstance(params, Adapter) else None
    if found != method:
        found = found or type(params).__name__
        raise StructureError(f"{what}: expected an adapter of {config}, found {found}")


def check_whole(params: Adapter, what: str, verb: str) -> None:
    """Refuse a part of a partition.

    Args:
        params: the adapter.
        what: what it was given to, for the message.
        verb: what to do with the whole instead, for the message.

    Raises:
        StructureError: it is a part.
    """
    if any(leaf is ABSENT for leaf in leaves(params)):
        raise StructureError(
            f"{what}: this is one part of a partition; {verb} the whole, "
            f"ll.combine(trainable, frozen)"
        )


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
    described = type(found).__name__
    if isinstance(found, (tuple, list, Mapping)) and not isinstance(found, Adapter):
        described = f"{described} of {len(found)}"
    return StructureError(f"{what}: expected {expected} as in the first, found {described}")


def every_adapter(params: Any, what: str) -> list[Adapter]:
    """The adapters in a tree, in order.

    Raises:
        StructureError: the tree holds something else, or no adapter.
    """
    found: list[Adapter] = []
    map_adapters(found.append, params, what)
    return found


def check_same_layout(a: Adapter, b: Adapter, what: str) -> None:
    """Refuse two adapters whose static data differ, naming the first difference.

    Raises:
        StructureError: they do.
    """
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
        raise other_method(a.layout, b.layout, what)


def other_method(first: Layout, other: Layout, what: str) -> StructureError:
    """The refusal of two adapters of different methods."""
    return StructureError(
        f"{what} is {other.variant.name!r}, the first {first.variant.name!r}: one method at a time"
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
