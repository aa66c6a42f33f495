"""The adapters of a bound model, and the names of their tensors in its state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..core.config import with_paths
from ..core.errors import StructureError
from ..core.layout import Layout
from ..core.stacked import Stacked
from ..core.torch_internals import is_sharded
from ..layers.tied import holder_of
from .state import CHILD, Held, Leaves, leaves_at

__all__ = [
    "Entry",
    "base_keys",
    "base_modules",
    "entries_of",
    "keep_entries",
    "leaf_keys",
    "part_of",
    "tensors_in",
    "underneath",
]

_KEPT = "_ll_bound"


class Entry(NamedTuple):
    """One adapter of a bound model.

    Attributes:
        layout: its static data.
        slots: {path: its slot among the adapters that the site holds}.
    """

    layout: Layout
    slots: Mapping[str, str]


def entries_of(model: Any) -> list[Entry] | None:
    """The adapters of a bound model, in order; None for any other object."""
    kept: Sequence[Any] | None = getattr(model, "__dict__", {}).get(_KEPT)
    return None if kept is None else [Entry(*one) for one in kept]


def keep_entries(bound: nn.Module, entries: Sequence[Entry]) -> None:
    """Note on a bound model what its adapters are."""
    bound.__dict__[_KEPT] = list(entries)


def part_of(entry: Entry, path: str) -> Entry | None:
    """The part of an adapter inside the module at `path`, with paths that begin there."""
    if not path:
        return entry
    inside = {p: p[len(path) + 1 :] for p in entry.slots if p.startswith(f"{path}.")}
    inside |= {path: ""} if path in entry.slots else {}
    if not inside:
        return None
    return Entry(_part(entry.layout, inside), {inside[p]: entry.slots[p] for p in inside})


def _part(layout: Layout, names: Mapping[str, str]) -> Layout:
    """The layout of some sites alone, {path: new path}."""
    sites = [
        layout.sites[path].having(path=new) for path, new in names.items() if path in layout.sites
    ]
    if isinstance(layout, Stacked):
        members = [_part(member, names) for member in layout.members]
        extra = {new: layout.extra[path] for path, new in names.items()}
        return Stacked(members, layout.labels, sites, extra)
    return Layout(layout.variant, with_paths(layout.config, names), sites)


def base_keys(model: nn.Module) -> Iterator[str]:
    """The names of a bound model's parameters but those of its adapters."""
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name


def base_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all modules but those that hold a bound model's adapters. A module that has
    several paths comes with each of them.
    """
    yield path, model
    for name, child in model._modules.items():
        if child is not None and not isinstance(child, Held):
            yield from base_modules(child, f"{path}.{name}" if path else name)


def underneath(module: Any) -> Any:
    """A bound model's layer as its base has it, on a shallow copy; any other module as it is. What
    is adapted reads as the changed weight otherwise.
    """
    base = getattr(type(module), "_ll_base", None)
    if base is None:
        return module
    made = object.__new__(base)
    made.__dict__.update(module.__dict__)
    return made


def leaf_keys(bound: nn.Module, entry: Entry) -> Iterator[tuple[str, str, str]]:
    """(path of a site, name of a leaf, its key in the bound model's state dict), for each leaf; one
    that several sites share has a key at each.
    """
    for path, slot in entry.slots.items():
        holder, leaves = holder_of(entry.layout.sites[path]), _leaves(bound, entry, path)
        prefix = f"{holder}.{CHILD}" if holder else CHILD
        for name in leaves.names:
            # A leaf may be the weight of a layer of its own.
            inner = f"{name}.weight" if name in leaves._modules else name
            yield path, name, f"{prefix}.{slot}.{inner}"


def tensors_in(bound: nn.Module, entry: Entry) -> dict[str, dict[str, Tensor]]:
    """{path: {lora_name: tensor}}: an adapter's tensors as they are now, detached.

    Raises:
        StructureError: a site was taken out of the model since it was bound, or what sites share
            was sharded apart.
    """
    _check_shared(bound, entry)
    found = {path: _leaves(bound, entry, path).tensors() for path in entry.slots}
    return {
        path: {name: t.detach() for name, t in tensors.items()} for path, tensors in found.items()
    }


def _check_shared(bound: nn.Module, entry: Entry) -> None:
    """Refuse tensors of several sites that became one for each, as older torch's fully_shard makes
    them where sites are in groups of their own. What they learned there isn't one adapter.
    """
    seen: dict[tuple[str, str], Any] = {}
    for path, groups in entry.layout.shared.items():
        parameters = _leaves(bound, entry, path)._parameters
        for name, group in groups.items():
            t: Any = parameters.get(name)
            if is_sharded(t) and seen.setdefault((group, name), t) is not t:
                raise StructureError(
                    f"site {path!r}: its {name} is one tensor for several sites, and fully_shard "
                    f"has put it in several groups, where each learns another; shard those modules "
                    f"together, fully_shard([*model.layers]), or the whole model at once"
                )


def _leaves(bound: nn.Module, entry: Entry, path: str) -> Leaves:
    try:
        module = bound.get_submodule(holder_of(entry.layout.sites[path]))
        return leaves_at(module, entry.slots[path])
    except (AttributeError, KeyError):
        raise StructureError(
            f"site {path!r}: the module there isn't the one that was bound, its adapter went with "
            f"that"
        ) from None
