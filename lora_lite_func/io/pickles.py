"""Tensors of files that torch.save wrote. None of the code in them is run, and memory is
bounded.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CheckpointError, short_repr
from .files import check_regular

__all__ = ["read_pickle"]

# The most bytes of a .bin file's index, its tensors not counted.
_LONGEST_PICKLE = 2**26
# How many tensors may share memory on average, as tied ones do. Readers copy each of them.
_SHARED_BY = 4
_ALLOCATES = ("builtins bytearray", "__builtin__ bytearray")
"""What torch's restricted reader would make of any size that a file names."""


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a file that torch.save wrote. Torch's restricted reader reads it, so
    that no code in the file is run, and memory stays within a few times the file's size.

    Raises:
        CheckpointError: the file holds anything but a flat mapping of tensors, is compressed, or
            can't be read.
    """
    where = os.fsdecode(path)
    check_regular(where)
    _check_archive(where)
    try:
        found = torch.load(where, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise CheckpointError(
            f"{where}: can't be read without running code in it: {short_repr(str(error))}"
        ) from error
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{where}: expected a flat mapping of names to tensors, found {type(found).__name__}"
        )
    for key, t in found.items():
        if not isinstance(key, str) or type(t) not in (Tensor, nn.Parameter) or t.is_nested:
            raise CheckpointError(
                f"{where}: expected a flat mapping of names to tensors, found {_kind(t)} under "
                f"{short_repr(key)}"
            )
    _check_memory(where, found)
    return {key: t.detach().contiguous() for key, t in found.items()}


def _kind(value: Any) -> str:
    return f"a {'nested tensor' if isinstance(value, Tensor) else type(value).__name__}"


def _check_archive(where: str) -> None:
    """Refuse an archive that unpacks to more than its own size, or whose index makes anything but
    tensors.
    """
    try:
        with zipfile.ZipFile(where) as archive:
            entries = archive.infolist()
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"{where}: {short_repr(entry.filename)} is compressed, which torch.save "
                        f"doesn't do"
                    )
            claimed, size = sum(entry.file_size for entry in entries), os.path.getsize(where)
            if claimed > size:
                raise CheckpointError(
                    f"{where}: its entries overlap: they have {claimed} bytes, the file {size}"
                )
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    _check_index(where, archive, entry)
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{where}: not a readable file of torch.save (1.6 or newer): {error}"
        ) from error


def _check_index(where: str, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    if entry.file_size > _LONGEST_PICKLE:
        raise CheckpointError(
            f"{where}: its index has {entry.file_size} bytes, expected at most {_LONGEST_PICKLE}"
        )
    strings: list[str] = []
    try:
        for code, argument, _ in pickletools.genops(archive.read(entry)):
            if isinstance(argument, str):
                strings.append(argument)
            named = argument if code.name == "GLOBAL" else " ".join(strings[-2:])
            if code.name in ("GLOBAL", "STACK_GLOBAL") and str(named) in _ALLOCATES:
                raise CheckpointError(f"{where}: its index makes a {named}, not tensors alone")
    except CheckpointError:
        raise
    except Exception as error:  # a damaged index can raise anything
        raise CheckpointError(f"{where}: its index is damaged: {short_repr(str(error))}") from error


def _check_memory(where: str, found: Mapping[str, Tensor]) -> None:
    """Refuse tensors that claim more memory than the file has for them, one by one or as views of
    each other.
    """
    storages: dict[int, int] = {}
    total = 0
    for key, t in found.items():
        held = 0 if t.layout != torch.strided else t.untyped_storage().nbytes()
        if t.numel() * t.element_size() > held:
            raise CheckpointError(
                f"{where}: {short_repr(key)} claims shape {tuple(t.shape)}, more than the file "
                f"holds for it"
            )
        storages[t.untyped_storage().data_ptr()] = held
        total += t.nbytes
    if total > _SHARED_BY * sum(storages.values()):
        raise CheckpointError(
            f"{where}: its tensors are views of each other: they have {total} bytes, the file "
            f"{sum(storages.values())} for them"
        )
