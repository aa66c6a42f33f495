"""From the paths in PEFT's keys to a model's modules and parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import CheckpointError, UnsupportedError, nearest, short_repr
from ...core.site import Site
from ...layers.kinds import KINDS, facts, kind_of
from ...layers.refusals import refuse_uncopyable
from ...layers.weights import own_tensor, stored
from ..assembly import ModuleEntry
from ..metadata import ConfigReader
from ..renaming import Paths
from .codec import Codec
from .completeness import check_complete, check_targeted
from .keys import WRAPPED, attention, elsewhere
from .unlike_layers import unlike

__all__ = ["adaptable", "entries_of", "refuse_tied"]


def _name_in_attention(modules: Mapping[str, nn.Module], entry: ModuleEntry) -> None:
    """What the config calls a part of attention: PEFT wraps the module that holds it."""
    parent = attention(modules, entry.path)
    if parent is not None:
        # PEFT (0.21 at least) adds out_proj's update twice in each call, and trained it so
        entry.named, entry.times = parent, 2.0 if entry.path.endswith("out_proj") else 1.0


def entries_of(
    model: Any,
    reader: ConfigReader,
    method: Codec,
    sites: Mapping[str, Any],
    shared: Mapping[str, Tensor],
    paths: Paths | None = None,
) -> dict[str, ModuleEntry]:
    """Return {path in the file: its module}.

    Args:
        model: the base, if it was given.
        reader: the config.
        method: the file's method.
        sites: the paths.
        shared: the tensors that all modules share.
        paths: where the file's paths are in the model. Without it they are where they say.

    Raises:
        CheckpointError: there are no paths, a module isn't in the config or in the model, or one
            that the config names has no tensors.
    """
    if model is None:
        check_targeted(reader, {path: path for path in sites})
        if method.sizes is None:
            return {path: ModuleEntry(path, shared) for path in sites}
        return {
            path: ModuleEntry(path, shared, _sized(path, method.sizes(path, own), own))
            for path, own in sites.items()
        }
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"expected an nn.Module for the base, found {type(model).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    moved = {path: path if paths is None else _moved(paths, path) for path in sites}
    where = {path: _resolved(modules, reader, moved[path]) for path in sites}
    bare = {path for path, found in where.items() if found not in modules}
    named = {path: found for path, found in where.items() if path not in bare}
    check_targeted(reader, named, modules)
    known = adaptable(model, where.values())
    if len(known) != len(where):
        twice = next(found for found, n in Counter(where.values()).items() if n > 1)
        raise CheckpointError(f"{reader.where}: tensors of two adapters for {short_repr(twice)}")
    check_complete(model, modules, reader, method, {*sites, *where.values()}, where)
    entries = {path: ModuleEntry(found, shared, *known[found]) for path, found in where.items()}
    _number(entries.values(), modules)
    _refuse_unlike(entries.values(), modules, reader, method)
    for path, entry in entries.items():
        if moved[path] != path:
            entry.named = path.partition(WRAPPED)[0]  # as the config knows it
        _name_in_attention(modules, entry)
        # torch's attention reads the bare weight, where PEFT has wrapped this layer alone
        alone = path.endswith("out_proj") and not path.endswith(f"{WRAPPED}.out_proj")
        entry.unheard = alone and attention(modules, entry.path) is not None
    _refuse_turned(entries.values(), reader)
    return entries


def _refuse_unlike(
    entries: Iterable[ModuleEntry],
    modules: Mapping[str, nn.Module],
    reader: ConfigReader,
    method: Codec,
) -> None:
    """Refuse places where PEFT computes something else than the changed weight does."""
    rewritten = method.rewrites_base is not None and method.rewrites_base(reader)
    for entry in entries:
        # PEFT changes one of two places that share it, or rewrites both where one was meant.
        if KINDS[entry.kind].bare or (entry.kind == "linear" and rewritten):
            refuse_tied(
                reader, modules, entry.path if KINDS[entry.kind].bare else f"{entry.path}.weight"
            )
        reason = unlike(entry.path, modules, method, written=False)
        if reason is not None:
            raise CheckpointError(
                f"{reader.where}: {short_repr(entry.path)}: {reason}merge it in PEFT "
                f"(merge_and_unload), whose outputs then are those of the changed weight"
            )


def _refuse_turned(entries: Collection[ModuleEntry], reader: ConfigReader) -> None:
    """Refuse a part of attention beside layers that are stored transposed."""
    across = next(
        (
            f"{p.path!r}"
            for p in entries
            if p.kind == "linear" and p.site is not None and p.site.transposed
        ),
        "its config",
    )
    transposed = reader.flag("fan_in_fan_out") or across != "its config"
    if transposed and any(entry.named for entry in entries):
        raise CheckpointError(
            f"{reader.where}: where layers are stored transposed ({across}), PEFT turns the "
            f"update of attention's out_proj around"
        )


def _number(entries: Iterable[ModuleEntry], modules: Mapping[str, nn.Module]) -> None:
    """Number the places in the order of the model's modules."""
    order = {name: i for i, name in enumerate(modules)}
    in_order = sorted(entries, key=lambda entry: order.get(entry.path, len(order)))
    for i, entry in enumerate(in_order):
        entry.index, entry.count, entry.among = i, len(in_order), in_order


def _moved(paths: Paths, path: str) -> str:
    """Return a path of the file, with PEFT's wrappers in it, as the model has it."""
    bare = path.replace(WRAPPED, "")
    found = paths.find(bare)
    if found == bare:
        return path
    return found + path[len(_unwrapped(path)) :]


def _unwrapped(path: str) -> str:
    """Return a path of the file without the wrappers at its end."""
    while path.endswith(WRAPPED):
        path = path.removesuffix(WRAPPED)
    return path


def refuse_tied(
    reader: ConfigReader,
    modules: Mapping[str, Any],
    path: str,
    known: Mapping[str, Tensor] | None = None,
) -> None:
    """Refuse a change of a parameter that is held elsewhere too, because PEFT changes it in one
    place. Equal copies in all places count as one.

    Raises:
        CheckpointError: the message gives both names.
    """
    known = known or {}
    for other in elsewhere(modules, path):
        if path not in known or other not in known or not torch.equal(known[path], known[other]):
            raise CheckpointError(
                f"{reader.where}: changes {short_repr(path)}, which is {short_repr(other)} too: "
                f"PEFT doesn't change both alike, and here they are one tensor; untie them in the "
                f"model first (layer.weight = nn.Parameter(layer.weight.detach().clone()))"
            )


def _sized(path: str, sizes: tuple[int, int], names: Iterable[str]) -> Site:
    """Return a site as its tensors alone tell it.

    Raises:
        CheckpointError: the tensors tell no size.
    """
    if min(sizes) < 1:
        raise CheckpointError(
            f"{short_repr(path)}: its tensors are those of a layer {sizes[0]} -> {sizes[1]}"
        )
    table = any("embedding" in name for name in names)
    return Site(path, *sizes, kind="embedding", transposed=True) if table else Site(path, *sizes)


def _resolved(modules: Mapping[str, nn.Module], reader: ConfigReader, path: str) -> str:
    """Return our path of what a key's path means: a module, or a parameter of it."""
    parent, names = _unwrapped(path), reader.names("target_parameters")
    if parent in modules and names:
        full = [f"{parent}.{name}" for name in modules[parent]._parameters]
        wanted = [p for p in full if any(p == n or p.endswith("." + n) for n in names)]
        depth = (len(path) - len(parent)) // len(WRAPPED)
        if depth < len(wanted):
            # PEFT wraps the first one registered before the others, so it is innermost.
            return wanted[len(wanted) - 1 - depth]
    if path in modules:
        return (
            f"{path}.in_proj_weight" if isinstance(modules[path], nn.MultiheadAttention) else path
        )
    return path.replace(WRAPPED, "")  # it is an attention's out_proj, inside the wrapper


def adaptable(model: nn.Module, paths: Iterable[str]) -> dict[str, tuple[Site, Any]]:
    """Return {path: (Site, module)} of these modules and parameters of a model.

    Raises:
        CheckpointError: the model lacks a path.
        UnsupportedError: a layer can't be adapted.
    """
    refuse_uncopyable(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, tuple[Site, Any]] = {}
    for path in paths:
        module, kind, name = modules.get(path), None, "weight"
        if module is None:
            parent, _, name = path.rpartition(".")
            module = modules.get(parent)
            tensor = None if module is None else own_tensor(module, name)
            kind = KINDS["parameter" if tensor is None or tensor.ndim > 1 else "vector"]
            if module is None or tensor is None:
                raise CheckpointError(
                    f"{type(model).__name__} has no module {short_repr(path)}; "
                    f"{nearest(path, modules)} Where modules have moved since, rename= says how."
                )
        else:
            attends = KINDS["attention"]
            kind = attends if attends.holds(module) else kind_of(module)
        if kind is None:
            raise UnsupportedError(
                f"{short_repr(path)}: this {type(module).__name__} can't be adapted here"
            )
        f = facts(kind, module, name)
        bias = not kind.bare and isinstance(stored(module, "bias"), Tensor)
        found[path] = (
            Site(
                path,
                f.d_in,
                f.d_out,
                bias,
                kind.name,
                num_experts=f.num_experts,
                transposed=f.transposed,
                plus_one=f.plus_one,
            ),
            module,
        )
    return found
