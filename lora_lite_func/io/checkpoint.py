"""One safetensors file for an adapter, several, or a stack.

Keys are flat, `<path>.<lora_name>`; the layouts are JSON metadata:

    one adapter   {"format", "variant", "config", "sites"}, and "stack": K where every tensor has a
                  leading K
    several       {"format", "parts": [as above, ...], "as": "tuple" | "list" | "dict",
                  "names": [...]}, keys `<name>/<path>.<lora_name>`
    both          "same": {key: key}: frozen tensors that share memory are stored once

In a folder that a tool may take for a model's, the file is called model.safetensors. There an empty
tensor has the name of one of the model's own parameters (metadata "not_a_model"), so that whatever
loads the file as the model's weights finds that they don't fit.

A file is hostile until shown otherwise: everything it says is checked before anything is built, no
code is run, and a fault is a CheckpointError that names what and where.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, rebuild
from ..core.errors import CheckpointError, short_repr
from ..core.shared import each_site
from ..core.stacked import Stacked
from .checks import check_keys, check_model, check_present, check_shapes, check_tensor, check_values
from .contents import contents_from_json
from .file_kinds import reader_hint
from .files import check_regular, parse_json, path_of, unreadable
from .manifest import Piece, joined, pieces_of, pieces_to_json
from .writing import write_safetensors

__all__ = ["IN_FOLDERS", "OWN", "Saved", "load", "read_mapped", "save", "save_in_folder"]

OWN = "lora_lite_func"
"""The metadata entry of our own files."""

IN_FOLDERS = "model.safetensors"
"""The name of our file in a folder. Trainers of transformers look for what they resume from there.
"""

_NOT_A_MODEL = "not_a_model"

Saved = Adapter | tuple[Adapter, ...] | list[Adapter] | dict[str, Adapter]
"""What a file may hold."""


def save(params: Saved, path: str | os.PathLike[str]) -> None:
    """Write an adapter, a stack, or a tuple, list or dict of them to one safetensors file. The
    write is atomic, and exact for every dtype.

    Frozen tensors that several sites share are stored once.

    Args:
        params: what to save. The names in a dict must be free of "/".
        path: the file. An old one is replaced when the new one is whole, and its permissions stay.

    Raises:
        CheckpointError: `params` isn't an adapter or is a part of a partition, a tensor has no
            storage (sparse, or of a transform), or the file can't be written.
    """
    tensors, metadata = _contents(params)
    write_safetensors(tensors, path, metadata, "save")


def save_in_folder(params: Saved, folder: str | os.PathLike[str], guard: str) -> None:
    """Write what `save` writes to a folder that a tool may take for a model's.

    Args:
        params: as in `save`.
        folder: the folder.
        guard: the name of a parameter of the model.

    Raises:
        CheckpointError: as `save`.
    """
    tensors, metadata = _contents(params)
    if guard in tensors:
        raise CheckpointError(f"save: {guard!r} is the name of an adapter's tensor, too")
    path = os.path.join(folder, IN_FOLDERS)
    guarded = {**tensors, guard: torch.empty(0)}
    write_safetensors(guarded, path, {**metadata, _NOT_A_MODEL: guard}, "save")


def _contents(params: Saved) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors by their keys, and the file's metadata."""
    pieces = pieces_of(params)
    same: dict[str, str] = {}
    tensors = _flat(pieces, same)
    says = pieces_to_json(params, pieces)
    if same:
        says["same"] = same
    return tensors, {OWN: json.dumps(says, separators=(",", ":"))}


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    member: int | str | None = None,
) -> Any:
    """Read what `save` wrote. It needs no model, and checks sites and shapes against one if given.

    Args:
        path: the file; or the folder that a bound model's `save_pretrained` wrote.
        model: the base that the adapter should fit.
        device: where the tensors go; the CPU by default.
        member: the number of a stack's member, which alone is then read from the disk; or the index
            or name of one adapter in a tuple, list or dict.

    Raises:
        CheckpointError: there is no such device; the file isn't safetensors, is truncated or has no
            metadata; its variant or
            format version is unknown; its config or a site has missing, unknown or wrongly typed
            fields; a tensor is missing, unexpected, or of the wrong shape or dtype; an index is out
            of range; or `model` lacks a site.
    """
    return _read_file(path, model, device, member, copied=True)


def read_mapped(path: str | os.PathLike[str], model: nn.Module | None = None) -> Any:
    """`load` without a copy: the tensors are the file's own pages, to be read once and soon.

    Raises:
        CheckpointError: as `load`.
    """
    return _read_file(path, model, None, None, copied=False)


def _read_file(
    path: str | os.PathLike[str],
    model: nn.Module | None,
    device: str | torch.device | None,
    member: int | str | None,
    copied: bool,
) -> Any:
    where = path_of(path, "load")
    _check_device(device)
    if os.path.isdir(where):
        folder, where = where, os.path.join(where, IN_FOLDERS)
        if not os.path.exists(where):
            raise CheckpointError(
                f"{folder}: not a readable safetensors file: it is a folder without {IN_FOLDERS}; "
                f"ll.from_peft reads PEFT's"
            )
    check_regular(where)
    try:
        with safetensors.safe_open(where, framework="pt") as file:
            metadata = file.metadata() or {}
            says = metadata.get(OWN)
            try:
                if says is None:
                    raise CheckpointError(
                        f"no {OWN!r} entry in its metadata, so it isn't an adapter that ll.save "
                        f"wrote{reader_hint(file.keys(), metadata)}"
                    )
                stored = [key for key in list(file.keys()) if key != metadata.get(_NOT_A_MODEL)]
                says = parse_json(says, f"its {OWN!r} metadata")
                return _read(file, stored, says, model, member, device, copied)
            except CheckpointError as error:
                raise CheckpointError(f"{where}: {error}") from None
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(unreadable(where, error)) from error


def _check_device(device: str | torch.device | None) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"load: device: can't put tensors on {short_repr(device)}: "
            f"{str(error).splitlines()[0][:200]}"
        ) from None


# ------------------------------------------------------------------------------------------ writing
def _flat(pieces: list[Piece], same: dict[str, str]) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    storages: set[int] = set()
    frozen: dict[Any, str] = {}
    for piece in pieces:
        for path, held in piece.data.items():
            for name, leaf in held.items():
                key = joined(piece.prefix, path, name)
                try:
                    check_tensor(piece, path, name, leaf)
                    if not piece.layout.specs[path][name].trainable:
                        memory = (
                            leaf.data_ptr(),
                            leaf.dtype,
                            leaf.shape,
                            leaf.stride(),
                            leaf.device,
                        )
                        if leaf.numel() and frozen.setdefault(memory, key) != key:
                            same[key] = frozen[memory]
                            continue
                    flat[key] = _stored(leaf.detach().contiguous(), storages)
                except CheckpointError as error:
                    raise CheckpointError(f"save: {error}") from None
                except RuntimeError as error:
                    raise CheckpointError(
                        f"save: {path!r} {name} has no storage (sparse, or inside a transform): "
                        f"{error}"
                    ) from error
    return flat


def _stored(leaf: Tensor, storages: set[int]) -> Tensor:
    """Return a tensor that fills a storage of its own, because safetensors refuses others."""
    start = leaf.untyped_storage().data_ptr()
    if start in storages or leaf.untyped_storage().nbytes() != leaf.nbytes:
        leaf = leaf.clone()
    storages.add(leaf.untyped_storage().data_ptr())
    return leaf


# ------------------------------------------------------------------------------------------ reading
def _read(
    file: Any,
    stored: list[str],
    says: Any,
    model: nn.Module | None,
    member: int | str | None,
    device: Any,
    copied: bool,
) -> Any:
    same, shape = contents_from_json(says, stored)
    pieces = shape.pieces
    keys = {
        joined(piece.prefix, path, name)
        for piece in pieces
        for path, names in piece.layout.names.items()
        for name in names
    }
    check_keys(
        keys,
        {*stored, *same},
        sum(len(names) for piece in pieces for names in piece.layout.names.values()),
    )
    shape, index = shape.chosen(member)
    cache: dict[Any, Tensor] = {}

    def tensor(key: str, row: int | None) -> Tensor:
        key = same.get(key, key)
        if (key, row) not in cache:
            # Clones are aligned, so that products are bit-equal to those before the save, and
            # they don't depend on the file from here on.
            read = file.get_tensor(key) if row is None else file.get_slice(key)[row]
            if copied:
                read = read.clone() if device is None else read.to(device, copy=True)
            cache[key, row] = read
        return cache[key, row]

    made = []
    for piece in shape.pieces:
        check_shapes(file, piece, same)
        made.append(_adapter(piece, index, tensor, same))
        if model is not None:
            check_model(piece.layout, model)
    return shape.put_together(made)


def _adapter(
    piece: Piece,
    row: int | None,
    tensor: Callable[[str, int | None], Tensor],
    same: Mapping[str, str],
) -> Adapter:
    layout = piece.layout
    if isinstance(layout, Stacked) and row is not None:
        layout = layout.member(row)
    data = {
        path: {name: tensor(joined(piece.prefix, path, name), row) for name in names}
        for path, names in layout.names.items()
    }
    if layout is not piece.layout:  # a member narrower than the widest was padded
        data = {
            p: {n: _cut(t, layout.specs[p][n].shape) for n, t in held.items()}
            for p, held in data.items()
        }
    one = Piece(piece.prefix, layout, data, 0 if row is not None else piece.count)
    for path, held in data.items():
        for name, leaf in held.items():
            check_tensor(one, path, name, leaf)
            if layout.specs[path][name].trainable and joined(piece.prefix, path, name) in same:
                raise CheckpointError(
                    f"{short_repr(path)} {name} shares another tensor, and it is a trainable one"
                )
    for path, tensors in each_site(layout.shared, data):
        check_values(layout, path, tensors)
        check_present(layout, path, tensors)
    return rebuild(
        layout, (data[path][name] for path, names in layout.names.items() for name in names)
    )


def _cut(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the leading corner of this shape."""
    return t if tuple(t.shape) == shape else t[tuple(slice(n) for n in shape)].clone()
