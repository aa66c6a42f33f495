"""What is written besides a method's tensors: modules trained whole, biases, replaced rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ...core.errors import UnsupportedError
from ...core.site import Site
from ...layers.kinds import restored
from ...layers.weights import own_tensor, read_tensor, stored
from .keys import KeyMap, elsewhere

__all__ = ["Values", "biases", "copies", "whole"]


Values = Mapping[str, tuple[Site, Tensor]]
"""{path of a parameter or buffer: (its site, its values as methods see them)}."""


def whole(
    values: Values, modules: Mapping[str, Any], sites: Iterable[str]
) -> tuple[list[str], dict[str, Tensor]]:
    """Return (modules_to_save, tensors) of parameters that were trained whole. The rest of their
    modules goes along, because PEFT keeps copies of modules.

    PEFT finds modules by the end of their names, so others of the same ending are kept too, as they
    are.

    Raises:
        UnsupportedError: a parameter belongs to the outermost module, or to a module with another
            adapter in it.
    """
    trained = dict(values)
    for path in values:  # a tied parameter is one tensor here
        trained |= dict.fromkeys(elsewhere(modules, path), values[path])
    parents = {path.rpartition(".")[0] for path in trained}
    for path in trained:
        parent, _, name = path.rpartition(".")
        if not parent or parent not in modules or own_tensor(modules[parent], name) is None:
            raise UnsupportedError(
                f"to_peft: {path!r}: PEFT keeps copies of modules inside the model given, and "
                f"there is none of this name"
            )
    named = [path for path in modules if any(path.endswith(parent) for parent in parents)]
    parents = {path for path in named if not any(path.startswith(other + ".") for other in named)}
    busy = next(
        (site for site in sites for parent in parents if f"{site}.".startswith(parent + ".")), None
    )
    if busy is not None:
        raise UnsupportedError(
            f"to_peft: {busy!r} has an adapter and is in a module that PEFT would keep a copy "
            f"of; write a folder for each"
        )
    kept: dict[str, Tensor] = {}
    for key in (f"{parent}.{name}" for parent in parents for name in modules[parent].state_dict()):
        parent, _, leaf = key.rpartition(".")
        if parent in modules:  # a bound model's own tensors are none of the base's
            kept[key] = read_tensor(modules[parent], leaf)
    for path, (site, W) in trained.items():
        kept[path] = _restored(W, kept[path], site)
    return sorted(parents), kept


def _restored(W: Tensor, base: Tensor, site: Site) -> Tensor:
    """Return values in the form of the base's tensor. A counter's are whole numbers again."""
    made = restored(W, base.to(W.dtype), site)
    return made if base.is_floating_point() else made.to(base.dtype)


def copies(
    values: Values, modules: Mapping[str, Any], keys: KeyMap, rows: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return {key: tensor} of what stands for the base's own tensors and isn't trained, at all
    places that hold it. PEFT loads what it finds under a base's key.

    Args:
        values: those of FullConfig(frozen=True).
        modules: the base's, by path.
        keys: where modules go in the file, with the wrappers around them.
        rows: {path of a module with replaced rows: the wrapper that PEFT has around it for them}.

    Raises:
        UnsupportedError: the model that was given lacks a parameter.
    """
    kept: dict[str, Tensor] = {}
    for path, (site, W) in values.items():
        for place in (path, *elsewhere(modules, path)):
            parent, _, name = place.rpartition(".")
            if parent not in modules or own_tensor(modules[parent], name) is None:
                raise UnsupportedError(
                    f"to_peft: {path!r} stands for a parameter of the base, and the model given "
                    f"has none of this name"
                )
            key = f"{keys.inside(parent)}{rows.get(parent, '')}.{name}"
            kept[key] = _restored(W, read_tensor(modules[parent], name), site)
    return kept


def biases(
    shifts: Mapping[str, Tensor],
    modules: Mapping[str, Any],
    keys: KeyMap,
    sites: Mapping[str, Any],
    copied: Iterable[str],
) -> tuple[str, dict[str, Tensor]]:
    """Return (bias, tensors) that hold learned shifts as learned biases, either of the adapted
    layers alone or of the whole model.

    Raises:
        UnsupportedError: a layer has no bias, or one that PEFT doesn't keep.
    """
    for path, t in shifts.items():
        bias = stored(modules[path], "bias") if path in modules else None
        if not isinstance(bias, Tensor) or bias.shape != t.shape:
            raise UnsupportedError(
                f"to_peft: {path!r}: PEFT keeps learned biases, and this layer of the model "
                f"given has none; merge it"
            )
        if any(f"{path}.".startswith(parent + ".") for parent in copied):
            raise UnsupportedError(
                f"to_peft: {path!r} is in a module that is kept whole; write a folder for each"
            )
    alone = shifts.keys() <= sites.keys()
    kept: dict[str, Tensor] = {}
    for path, module in modules.items():
        bias = stored(module, "bias")
        if (
            not isinstance(bias, Tensor)
            or (alone and path not in sites)
            or any(f"{path}.".startswith(parent + ".") for parent in copied)
        ):
            continue
        key = f"{keys.inside(path)}.bias" if path else "bias"
        kept[key] = (
            bias.detach()
            if path not in shifts
            else bias.detach().to(shifts[path].dtype) + shifts[path]
        )
    return "only" if alone else "all", kept
