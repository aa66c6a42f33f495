"""Reading files from unknown sources: reads are bounded and run no code. Faults are
CheckpointErrors.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from typing import Any

import safetensors
from torch import Tensor

from ..core.errors import CheckpointError, short_repr
from .file_kinds import looks_like

__all__ = [
    "check_regular",
    "parse_json",
    "path_of",
    "read_header",
    "read_json",
    "read_safetensors",
    "unreadable",
]

# The most bytes that are read. The configurations of real adapters have kilobytes.
_LONGEST_JSON = 2**25


def path_of(path: Any, what: str) -> str:
    """Return a path as text.

    Raises:
        CheckpointError: it is none, or empty. The message begins with `what`.
    """
    try:
        where = os.fsdecode(path)
    except TypeError:
        raise CheckpointError(
            f"{what}: expected a path (str or os.PathLike), found {short_repr(path)}"
        ) from None
    if not where:
        raise CheckpointError(f"{what}: expected a path, found an empty one; '.' is this folder")
    return where


def check_regular(where: str) -> None:
    """Refuse a pipe or a device, from which reading might never begin or never end.

    Raises:
        CheckpointError: the path is neither a file nor a folder.
    """
    try:
        mode = os.stat(where).st_mode
    except (OSError, ValueError):
        return  # opening it gives the error in words
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CheckpointError(
            f"{where}: expected a file, found a pipe or a device; copy what it gives to a file "
            f"first"
        )


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a safetensors file, with every tensor in memory of its own.

    Raises:
        CheckpointError: the file isn't safetensors, or can't be read.
    """
    with _opened(path) as file:
        # Clones are aligned, so that products are bit-equal to those before the save, and
        # they don't depend on the file from here on.
        tensors = {key: file.get_tensor(key).clone() for key in list(file.keys())}
        return tensors, dict(file.metadata() or {})


def read_header(path: str | os.PathLike[str]) -> tuple[list[str], dict[str, str]]:
    """Return (names of tensors, metadata) of a safetensors file.

    Raises:
        CheckpointError: the file isn't safetensors, or can't be read.
    """
    with _opened(path) as file:
        return list(file.keys()), dict(file.metadata() or {})


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a safetensors file for reading. What goes wrong in the block is a fault of the file."""
    where = path_of(path, "file")
    _check_file(where)
    try:
        with safetensors.safe_open(where, framework="pt") as file:
            yield file
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(unreadable(where, error)) from error


def unreadable(where: str, error: Exception) -> str:
    """Return what a message says of a file that isn't safetensors."""
    return f"{where}: not a readable safetensors file: {error}{looks_like(where)}"


def _check_file(where: str) -> None:
    check_regular(where)
    if os.path.isdir(where):
        raise CheckpointError(
            f"{where}: not a readable safetensors file: it is a folder; name the file in it, or "
            f"ll.from_peft reads PEFT's folders"
        )


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the value in a JSON file.

    Raises:
        CheckpointError: the file can't be read, is huge, isn't JSON, or says a key twice.
    """
    where = os.fsdecode(path)
    check_regular(where)
    try:
        with open(where, "rb") as file:
            raw = file.read(_LONGEST_JSON + 1)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where}: can't be read: {error}") from error
    return parse_json(raw, where)


def parse_json(raw: str | bytes, what: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        CheckpointError: the text is huge, isn't JSON, or says a key twice.
    """
    if len(raw) > _LONGEST_JSON:
        raise CheckpointError(f"{what}: expected at most {_LONGEST_JSON} bytes of JSON")
    try:
        return json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} isn't JSON: {str(error)[:300]}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key twice among {short_repr([key for key, _ in pairs])}")
    return found
