"""Replaced rows of tables of ids (PEFT's trainable tokens): read, and written."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.errors import CheckpointError, UnsupportedError, short_repr
from ...layers.kinds import KINDS
from ...layers.weights import read_tensor
from ...variants import TokensConfig
from ..assembly import ModuleEntry, Part
from ..metadata import ConfigReader
from .keys import elsewhere, first_name, ties
from .modules import adaptable

__all__ = ["read_rows", "tied_tables", "written_rows"]


# ------------------------------------------------------------------------------------------ reading
def read_rows(
    reader: ConfigReader,
    rows: Mapping[str, Tensor],
    replaced: Mapping[str, Tensor],
    model: nn.Module,
) -> list[tuple[ModuleEntry, Part]]:
    """Read new rows of tables, as what is added to the old ones.

    Where PEFT changes all places that share a table, the table itself is the one site.

    Args:
        reader: the config, with the ids.
        rows: {path of a module: its new rows (k, width)}.
        replaced: {path of a parameter: what the file has in its place}.
        model: the base.

    Raises:
        CheckpointError: ids and rows don't fit the table, or places that share one differ.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    listed = {path: _listed(reader, path, new, modules) for path, new in rows.items()}
    found: list[tuple[ModuleEntry, Part]] = []
    done: dict[str, Tensor] = {}
    for path, new in rows.items():
        names = [f"{path}.weight", *elsewhere(modules, f"{path}.weight")]
        parents = [name.rpartition(".")[0] for name in names]
        alike = all(listed[parent] == listed[path] for parent in parents if parent in listed)
        # PEFT replaces rows of a head alone where the file has none of the embedding's
        tied = alike and any(ties(model, modules[parent]) for parent in parents if parent in rows)
        tied = tied and len(parents) > 1
        if tied and path in done:
            if not torch.equal(done[path], new):
                raise CheckpointError(
                    f"{reader.where}: other rows of {path!r} than of {parents[1]!r}, with which it "
                    f"shares its table; untie them in the model first (layer.weight = "
                    f"nn.Parameter(layer.weight.detach().clone()))"
                )
            continue
        source = path
        stored = next((replaced[name] for name in names if name in replaced), None)
        if tied:
            done |= dict.fromkeys(parents, new)
        if tied or stored is not None:
            source = first_name(modules, names[0])
        part = _change(listed[path], new, read_tensor(modules[path]) if stored is None else stored)
        found.append((ModuleEntry(source, {}, *adaptable(model, [source])[source]), part))
    return found


def _change(ids: list[int], rows: Tensor, table: Tensor) -> Part:
    chosen, order = torch.tensor(ids).sort()
    change = rows[order] - table[chosen].to(rows)  # (k, width)
    exact = torch.float32 if len(table) <= 2**24 else torch.float64
    leaves = {"lora_rows": change, "lora_ids": chosen.to(exact)}
    return Part(TokensConfig, leaves, {"token_ids": tuple(chosen.tolist())}, order=3)


def _listed(reader: ConfigReader, path: str, rows: Tensor, modules: Mapping[str, Any]) -> list[int]:
    """Return the ids of a table's new rows, in the file's order.

    Raises:
        CheckpointError: there are none, or they don't fit.
    """
    listed: Any = reader.get("trainable_token_indices") or reader.get("token_indices")
    if isinstance(listed, Mapping):
        listed = next(
            (ids for name, ids in listed.items() if path == name or path.endswith("." + name)), None
        )
    module = modules.get(path)
    table = getattr(module, "weight", None)
    if not isinstance(table, Tensor) or table.ndim != 2 or not isinstance(module, nn.Module):
        raise CheckpointError(
            f"{reader.where}: the model has no table of rows at {short_repr(path)}, of which the "
            f"file has some"
        )
    many, width = (rows.shape[0], rows.shape[1]) if rows.ndim == 2 else (0, 0)
    if (
        not isinstance(listed, list)
        or len(listed) != many
        or not all(type(i) is int and 0 <= i < len(table) for i in listed)
    ):
        raise reader.refuse(
            "trainable_token_indices", f"{many} token ids below {len(table)} for {path!r}"
        )
    if width != table.shape[1] or len(set(listed)) != len(listed):
        raise CheckpointError(
            f"{reader.where}: {short_repr(path)}: rows of shape {tuple(rows.shape)} don't fit "
            f"this {type(module).__name__}"
        )
    return listed


def _padding(module: Any) -> int | None:
    """Return the id whose row of an embedding stays as it is where the embedding's module is the
    site.
    """
    padding: int | None = getattr(module, "padding_idx", None)
    return padding


# ------------------------------------------------------------------------------------------ writing
def written_rows(
    adapters: Iterable[Adapter], modules: Mapping[str, Any], every_place: bool
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Return ({path: ids}, {path: rows (k, width)}): the replaced rows of tables, by module.

    Args:
        adapters: those of TokensConfig.
        modules: the base's, by path.
        every_place: whether PEFT's file has the rows of a tied table once for each of its places.

    Raises:
        CheckpointError: the model whose rows they are wasn't given.
        UnsupportedError: PEFT would change a table elsewhere too, or in fewer places, or its names
            can't tell the table apart.
    """
    ids: dict[str, list[int]] = {}
    rows: dict[str, Tensor] = {}
    adapters = list(adapters)
    # PEFT leaves a place alone that has ids of its own
    apart = set() if every_place else {path for a in adapters for path in a}
    for a in adapters:
        for path, held in a.items():
            site = a.sites[path]
            bare = KINDS[site.kind].bare
            parent = path.rpartition(".")[0] if bare else path
            if parent not in modules:
                raise CheckpointError(
                    f"to_peft: {short_repr(path)}: PEFT's files hold whole rows of an embedding; "
                    f"give the base model"
                )
            if bare and not path.endswith(".weight"):
                raise UnsupportedError(
                    f"to_peft: {path!r}: PEFT replaces rows of a module's weight, and this is "
                    f"another parameter; merge it"
                )
            source, places = _places(parent, bare, modules, apart)
            chosen, change = held["lora_ids"].long(), held["lora_rows"]
            padding = _padding(modules[parent])
            if site.kind == "embedding" and padding is not None:
                change = change.masked_fill(chosen.eq(padding)[:, None], 0.0)
            table = read_tensor(modules[source])
            ids[source] = chosen.tolist()
            new = table[chosen].to(change.dtype) + change
            rows |= dict.fromkeys(places if every_place else [source], new)
    return ids, rows


def tied_tables(parent: str, modules: Mapping[str, Any]) -> list[str]:
    """Return the modules whose rows PEFT replaces where it is asked to replace this one's, this one
    among them. They are more than one where this is the model's own embedding.
    """
    names = [f"{parent}.weight", *elsewhere(modules, f"{parent}.weight")]
    return [n.rpartition(".")[0] for n in names] if ties(modules[""], modules[parent]) else [parent]


def _places(
    parent: str, bare: bool, modules: Mapping[str, Any], apart: Container[str]
) -> tuple[str, list[str]]:
    """Return (the module that PEFT's config names, all modules whose rows PEFT then replaces, but
    those `apart`).

    Raises:
        UnsupportedError: these aren't the places that the adapter changes.
    """
    names = [f"{parent}.weight", *elsewhere(modules, f"{parent}.weight")]
    holders = [name.rpartition(".")[0] for name in names] if bare else [parent]
    together = max((tied_tables(holder, modules) for holder in holders), key=len)
    together = [path for path in together if path == parent or path not in apart]
    if not bare and len(together) > 1:
        other = next(path for path in together if path != parent)
        raise UnsupportedError(
            f"to_peft: {parent!r}: PEFT would replace rows of {other!r} too, which shares its "
            f"table; train them together (target_parameters={names[0]!r}), or merge it"
        )
    if bare and len(names) > 1 and len(together) == 1:
        raise UnsupportedError(
            f"to_peft: {names[0]!r} is {names[1]!r} too, and PEFT would replace rows of one of "
            f"them alone; merge it"
        )
    named = next((path for path in together if ties(modules[""], modules[path])), parent)
    alike = [p for p in modules if p not in together and p.endswith(named)]
    if alike:
        raise UnsupportedError(
            f"to_peft: {named!r}: PEFT would replace rows of {alike[0]!r} too; merge it"
        )
    return named, together
