"""Reading and writing files that nobody vouches for: bounded, atomic, no code run. Faults are CheckpointErrors."""

from __future__ import annotations

import json
import os
import secrets
import stat
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..core.errors import CheckpointError, short_repr

__all__ = [
    "parse_json",
    "read_json",
    "read_pickle",
    "read_safetensors",
    "write_safetensors",
    "write_text",
]

_LONGEST_JSON = 2**25  # bytes; a configuration of real adapters has kilobytes
_LONGEST_PICKLE = 2**26  # bytes of the index of a .bin file, its tensors not counted


# ------------------------------------------------------------------------------------------ writing
def write_safetensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    what: str,
) -> None:
    """Write tensors (contiguous, no shared storage) to a file: atomic, by writing beside it and
    renaming.

    Raises:
        CheckpointError: it can't be written; beginning with `what`.
    """
    _atomic(
        path,
        what,
        lambda beside: safetensors.torch.save_file(dict(tensors), beside, dict(metadata)),
    )


def write_text(text: str, path: str | os.PathLike[str], what: str) -> None:
    """Write a text file, likewise.

    Raises:
        CheckpointError: it can't be written.
    """
    _atomic(path, what, lambda beside: beside.write_text(text, encoding="utf-8"))


def _atomic(path: str | os.PathLike[str], what: str, write: Callable[[Path], Any]) -> None:
    where = os.fsdecode(path)
    try:
        target = Path(os.path.realpath(where))  # a link stays one: what it points to is replaced
        beside = target.parent / f".{secrets.token_hex(8)}.tmp"
        rights = _created(beside)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{what}: can't write in {os.path.dirname(where) or '.'}: {error}"
        ) from error
    try:
        write(beside)
        os.chmod(beside, rights)
        os.replace(beside, target)
    except (OSError, safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{what}: can't write {where}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _created(path: Path) -> int:
    """The rights a new file gets here, by making one; safetensors gives its own fewer."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------ reading
def _regular(where: str) -> None:
    """Refuse what would never end, or never begin: a pipe, a device.

    Raises:
        CheckpointError: neither a file nor a folder.
    """
    try:
        mode = os.stat(where).st_mode
    except (OSError, ValueError):
        return  # which opening it says in words
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CheckpointError(
            f"{where}: expected a file, found a pipe or a device; copy what it gives to a file "
            f"first"
        )


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, every tensor in memory of its own.

    Raises:
        CheckpointError: it isn't one, or can't be read.
    """
    where = os.fsdecode(path)
    _regular(where)
    try:
        with safetensors.safe_open(where, framework="pt") as file:
            # clones: aligned, so that products are bit-equal to those before the save, and
            # independent of the file from here on
            keys = list(file.keys())
            tensors = {key: file.get_tensor(key).clone() for key in keys}
            return tensors, dict(file.metadata() or {})
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{where}: not a readable safetensors file: {error}") from error


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote, by its restricted reader: no code in it is run.

    Raises:
        CheckpointError: it holds anything but a flat mapping of tensors, is compressed, or can't be
            read.
    """
    where = os.fsdecode(path)
    _regular(where)
    try:
        with zipfile.ZipFile(where) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"{where}: {short_repr(entry.filename)} is compressed, which torch.save "
                        f"doesn't do"
                    )
                if entry.filename.endswith(".pkl") and entry.file_size > _LONGEST_PICKLE:
                    raise CheckpointError(
                        f"{where}: its index has {entry.file_size} bytes, expected at most "
                        f"{_LONGEST_PICKLE}"
                    )
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(
            f"{where}: not a readable file of torch.save (1.6 or newer): {error}"
        ) from error
    try:
        found = torch.load(where, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the restricted reader says of a damaged or hostile file
        raise CheckpointError(
            f"{where}: can't be read without running code in it: {short_repr(str(error))}"
        ) from error
    if not isinstance(found, Mapping) or not all(
        isinstance(k, str) and type(t) is Tensor for k, t in found.items()
    ):
        raise CheckpointError(
            f"{where}: expected a flat mapping of names to tensors, found {type(found).__name__}"
        )
    for key, t in found.items():
        if t.layout != torch.strided or t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise CheckpointError(
                f"{where}: {short_repr(key)} claims shape {tuple(t.shape)}, more than the file "
                f"holds for it"
            )
    return {key: t.contiguous() for key, t in found.items()}


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        CheckpointError: it can't be read, is huge, isn't JSON, or says a key twice.
    """
    where = os.fsdecode(path)
    _regular(where)
    try:
        with open(where, "rb") as file:
            raw = file.read(_LONGEST_JSON + 1)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where}: can't be read: {error}") from error
    return parse_json(raw, where)


def parse_json(raw: str | bytes, what: str) -> Any:
    """The value of a JSON text.

    Raises:
        CheckpointError: it is huge, isn't JSON, or says a key twice.
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
