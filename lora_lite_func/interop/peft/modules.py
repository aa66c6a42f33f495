"""From the paths in PEFT's keys to the places of a model: modules, parameters under their wrappers, learned biases, replaced tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError, nearest, shown
from ..kinds import KINDS, facts, kind_of
from ..layers import refuse_uncopyable, stored
from ..spec import Site
from ..variants import DoRAConfig, HiRAConfig
from .homes import WRAPPED, attention, elsewhere
from .method import Method, Part, Place
from .says import Says

__all__ = ["adaptable", "check_padding", "in_one_of", "places_of", "refuse_tied"]


def places_of(model: Any, says: Says, method: Method, sites: Mapping[str, Any], shared: Mapping[str, Tensor]) -> dict[str, Place]:
    """{path in the file: Place}.

    Raises:
        CheckpointError: nothing there, modules that the config doesn't name, or that the model hasn't; a named one without tensors.
    """
    if model is None:
        _check_targeted(says, {path: path for path in sites})
        if method.sizes is None:
            return {path: Place(path, shared) for path in sites}
        return {path: Place(path, shared, _sized(path, method.sizes(path, own), own)) for path, own in sites.items()}
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"expected an nn.Module for the base, found {type(model).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    where = {path: _resolved(modules, says, path) for path in sites}
    bare = {path for path, found in where.items() if found not in modules}
    _check_targeted(says, {path: found for path, found in where.items() if path not in bare})
    known = adaptable(model, where.values())
    if len(known) != len(where):
        twice = next(found for found, n in Counter(where.values()).items() if n > 1)
        raise CheckpointError(f"{says.where}: tensors of two adapters for {shown(twice)}")
    missing = next((p for p in _targeted(model, says) if p not in sites and p not in where.values()), None)
    if missing is not None and method.suffixes and method.peft_type != "ADALORA":  # which leaves out what it pruned
        raise CheckpointError(f"{says.where}: target_modules name {shown(missing)}, for which there is no tensor")
    lost = next((p for p in _parameters(modules, says) if p not in where.values()), None)
    if lost is not None:
        raise CheckpointError(f"{says.where}: target_parameters name {shown(lost)}, for which there is no tensor")
    places = {path: Place(found, shared, *known[found]) for path, found in where.items()}
    start = str(says.get("init_lora_weights")) if method.peft_type == "LORA" else ""
    for place in places.values():  # PEFT changes one of two places here, or both where the start was meant for one
        if KINDS[place.kind].bare or (place.kind == "linear" and start in ("pissa", "olora")):
            refuse_tied(says, modules, place.path if KINDS[place.kind].bare else f"{place.path}.weight")
    for place in places.values():
        home = attention(modules, place.path)
        if home is not None:  # PEFT (0.21 at least) adds out_proj's update twice in each call, so its adapters were trained that way
            place.named, place.times = home, 2.0 if place.path.endswith("out_proj") else 1.0
    across = next((f"{p.path!r}" for p in places.values() if p.kind == "linear" and p.site is not None and p.site.transposed), "its config")
    if (says.flag("fan_in_fan_out") or across != "its config") and any(place.named for place in places.values()):
        raise CheckpointError(
            f"{says.where}: where layers are stored transposed ({across}), PEFT turns the update of attention's out_proj around"
        )
    return places


def refuse_tied(says: Says, modules: Mapping[str, Any], path: str, known: Mapping[str, Tensor] | None = None) -> None:
    """Refuse a change of a parameter that is held elsewhere too, as PEFT changes it in one place; equal copies in all places are one.

    Raises:
        CheckpointError: with both names.
    """
    known = known or {}
    for other in elsewhere(modules, path):
        if path not in known or other not in known or not torch.equal(known[path], known[other]):
            raise CheckpointError(
                f"{says.where}: changes {shown(path)}, which is {shown(other)} too: PEFT doesn't change both alike, and here they are one "
                "tensor; untie them in the model first (layer.weight = nn.Parameter(layer.weight.detach().clone()))"
            )


def _sized(path: str, sizes: tuple[int, int], names: Iterable[str]) -> Site:
    """A site as its tensors alone tell it.

    Raises:
        CheckpointError: of no size.
    """
    if min(sizes) < 1:
        raise CheckpointError(f"{shown(path)}: its tensors are those of a layer {sizes[0]} -> {sizes[1]}")
    table = any("embedding" in name for name in names)
    return Site(path, *sizes, kind="embedding", transposed=True) if table else Site(path, *sizes)


def _check_targeted(says: Says, where: Mapping[str, str]) -> None:
    for path, found in where.items():
        if says.targeted(path) is False and says.targeted(path.partition(WRAPPED)[0]) is False:
            raise CheckpointError(f"{says.where}: tensors for {shown(found)}, which its target_modules don't name")


def _resolved(modules: Mapping[str, nn.Module], says: Says, path: str) -> str:
    """Our path of what a key's path means: a module, or a parameter of it."""
    home = path
    while home.endswith(WRAPPED):
        home = home.removesuffix(WRAPPED)
    names = says.names("target_parameters")
    if home in modules and names:
        full = [f"{home}.{name}" for name in modules[home]._parameters]
        wanted = [p for p in full if any(p == n or p.endswith("." + n) for n in names)]
        depth = (len(path) - len(home)) // len(WRAPPED)
        if depth < len(wanted):
            return wanted[len(wanted) - 1 - depth]  # the first one registered is wrapped first, so it is innermost
    if path in modules:
        return f"{path}.in_proj_weight" if isinstance(modules[path], nn.MultiheadAttention) else path
    return path.replace(WRAPPED, "")  # an attention's out_proj inside its wrapper


def _targeted(model: nn.Module, says: Says) -> list[str]:
    """The modules that PEFT would surely adapt."""
    saved = says.names("modules_to_save")
    kinds = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    found = [path for path, module in model.named_modules() if isinstance(module, kinds) and says.targeted(path)]
    return [p for p in found if not in_one_of(saved, p)]


def _parameters(modules: Mapping[str, Any], says: Says) -> list[str]:
    """The parameters that the config names."""
    named = says.names("target_parameters")
    full = (f"{path}.{name}" if path else name for path, module in modules.items() for name in module._parameters)
    return [p for p in full if any(p == name or p.endswith(f".{name}") for name in named)]


def adaptable(model: nn.Module, paths: Iterable[str]) -> dict[str, tuple[Site, Any]]:
    """{path: (Site, module)} of these modules and parameters of a model.

    Raises:
        CheckpointError: a path that the model hasn't.
        UnsupportedError: a layer that can't be adapted.
    """
    refuse_uncopyable(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, tuple[Site, Any]] = {}
    for path in paths:
        module, kind, name = modules.get(path), None, "weight"
        if module is None:
            home, _, name = path.rpartition(".")
            module = modules.get(home)
            tensor = None if module is None else module._parameters.get(name)
            kind = KINDS["parameter" if tensor is None or tensor.ndim > 1 else "vector"]
            if module is None or tensor is None:
                raise CheckpointError(f"{type(model).__name__} has no module {shown(path)}; {nearest(path, modules)}")
        else:
            kind = kind_of(module)
        if kind is None:
            raise UnsupportedError(f"{shown(path)}: this {type(module).__name__} can't be adapted here")
        f = facts(kind, module, name)
        bias = not kind.bare and isinstance(stored(module, "bias"), Tensor)
        found[path] = Site(path, f.d_in, f.d_out, bias, kind.name, stack=f.stack, transposed=f.transposed, plus_one=f.plus_one), module
    return found


def in_one_of(names: list[str], path: str) -> bool:
    """Whether a module is in one that PEFT finds by the end of its name."""
    parts = path.split(".")
    return any(".".join(parts[: i + 1]).endswith(name) for i in range(len(parts)) for name in names)


def check_padding(says: Says, place: Place, part: Part) -> None:
    """Refuse what moves an embedding's padding row, which stays as it is here.

    Raises:
        CheckpointError: with the id.
    """
    padding = getattr(place.module, "padding_idx", None) if place.kind == "embedding" else None
    A, ids, table = part.leaves.get("lora_A"), part.leaves.get("lora_ids"), stored(place.module, "weight")
    if padding is None or not isinstance(table, Tensor) or (A is not None and (A.ndim != 2 or A.shape[1] != len(table))):
        return  # a misfit is refused where it is fitted
    if ids is not None:
        moved = bool((part.leaves["lora_rows"][ids == padding] != 0).any())
    elif A is None:
        moved = False
    else:
        update, row = bool((A[:, padding] != 0).any()), bool((table[padding] != 0).any())
        moved = {HiRAConfig: update and row, DoRAConfig: update or row}.get(part.config, update)
    if moved:
        raise CheckpointError(f"{says.where}: {shown(place.path)}: changes the row of id {padding}, padding, which stays as it is here")
