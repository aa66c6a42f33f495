"""What is written beside a method's tensors: modules trained whole, biases, replaced rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...core.adapter import Adapter
from ...core.errors import CheckpointError, UnsupportedError, short_repr
from ...layers.kinds import restored
from ...layers.weights import held as held_tensor
from ...layers.weights import stored
from .keys import KeyMap, elsewhere, ties

__all__ = ["biases", "tokens", "whole"]


def whole(
    adapters: Sequence[Adapter], modules: Mapping[str, Any], sites: Iterable[str]
) -> tuple[list[str], dict[str, Tensor]]:
    """(modules_to_save, tensors): parameters that were trained whole, with the rest of their
    modules, of which PEFT keeps copies.

    PEFT finds modules by the end of their names, so others of the same ending are kept too, as they
    are.

    Raises:
        UnsupportedError: a parameter of the outermost module, or a module with another adapter in
            it.
    """
    trained = {path: (a.sites[path], held["lora_W"]) for a in adapters for path, held in a.items()}
    trained |= {
        other: trained[path] for path in trained for other in elsewhere(modules, path)
    }  # a tied one is one tensor here
    homes = {path.rpartition(".")[0] for path in trained}
    for path in trained:
        home, _, name = path.rpartition(".")
        if not home or home not in modules or modules[home]._parameters.get(name) is None:
            raise UnsupportedError(
                f"to_peft: {path!r}: PEFT keeps copies of modules inside the model given, and "
                f"there is none of this name"
            )
    named = [path for path in modules if any(path.endswith(home) for home in homes)]
    homes = {path for path in named if not any(path.startswith(other + ".") for other in named)}
    busy = next(
        (site for site in sites for home in homes if f"{site}.".startswith(home + ".")), None
    )
    if busy is not None:
        raise UnsupportedError(
            f"to_peft: {busy!r} has an adapter and is in a module that PEFT would keep a copy "
            f"of; write a folder for each"
        )
    kept: dict[str, Tensor] = {}
    for key in (f"{home}.{name}" for home in homes for name in modules[home].state_dict()):
        home, _, leaf = key.rpartition(".")
        kept[key] = held_tensor(modules[home], leaf)
    for path, (site, W) in trained.items():
        kept[path] = restored(W, kept[path].to(W.dtype), site)
    return sorted(homes), kept


def biases(
    shifts: Mapping[str, Tensor],
    modules: Mapping[str, Any],
    homes: KeyMap,
    sites: Mapping[str, Any],
    copied: Iterable[str],
) -> tuple[str, dict[str, Tensor]]:
    """(bias, tensors): learned shifts as learned biases: those of the adapted layers alone, or of
    all the model.

    Raises:
        UnsupportedError: a layer without a bias, or one whose bias PEFT doesn't keep.
    """
    for path, t in shifts.items():
        bias = stored(modules[path], "bias") if path in modules else None
        if not isinstance(bias, Tensor) or bias.shape != t.shape:
            raise UnsupportedError(
                f"to_peft: {path!r}: PEFT keeps learned biases, and this layer of the model "
                f"given has none; merge it"
            )
        if any(f"{path}.".startswith(home + ".") for home in copied):
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
            or any(f"{path}.".startswith(home + ".") for home in copied)
        ):
            continue
        key = f"{homes.inside(path)}.bias" if path else "bias"
        kept[key] = (
            bias.detach()
            if path not in shifts
            else bias.detach().to(shifts[path].dtype) + shifts[path]
        )
    return "only" if alone else "all", kept


def tokens(
    adapters: Sequence[Adapter], modules: Mapping[str, Any]
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """({path: ids}, {path: rows}): replaced rows of embeddings.

    Raises:
        CheckpointError: no model was given, whose rows they are.
        UnsupportedError: a table that PEFT would change elsewhere too, or that its names can't tell
            apart.
    """
    ids, rows = {}, {}
    for a in adapters:
        for path, held in a.items():
            if path not in modules:
                raise CheckpointError(
                    f"to_peft: {short_repr(path)}: PEFT's files hold whole rows of an embedding; "
                    f"give the base model"
                )
            table = stored(modules[path], "weight")
            tied = ties(modules[""], modules[path])
            shared = [
                p
                for p, m in modules.items()
                if tied and m is not modules[path] and stored(m, "weight") is table
            ]
            alike = [p for p in modules if p != path and p.endswith(path)]
            if shared or alike:
                raise UnsupportedError(
                    f"to_peft: {path!r}: PEFT would replace rows of {(shared + alike)[0]!r} too; "
                    f"merge it"
                )
            chosen, change = held["lora_ids"].long(), held["lora_rows"]
            padding = modules[path].padding_idx
            if padding is not None:
                change = change.masked_fill((chosen == padding)[:, None], 0.0)
            ids[path], rows[path] = (
                chosen.tolist(),
                held_tensor(modules[path])[chosen].to(change.dtype) + change,
            )
    return ids, rows
