"""Writing a file so that nothing is lost or half there. It is written beside the old one and moved
into place when it is whole.

Faults are CheckpointErrors.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..core.errors import CheckpointError
from .files import path_of

__all__ = ["check_replaceable", "own_copies", "write_safetensors", "write_text"]

_WRITE_FAULTS = (OSError, safetensors.SafetensorError, ValueError, RuntimeError)


def write_safetensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    what: str,
) -> None:
    """Write tensors to a file atomically, by writing beside it and renaming. The tensors must be
    contiguous and share no storage. A file that was there keeps its permissions.

    Raises:
        CheckpointError: the file can't be written. The message begins with `what`.
    """
    where = path_of(path, what)
    try:
        where.encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{what}: can't write {where!r}: its name isn't valid UTF-8; safetensors couldn't read "
            f"it again"
        ) from None
    _atomic(
        path,
        what,
        lambda temporary: safetensors.torch.save_file(dict(tensors), temporary, dict(metadata)),
    )


def own_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as `write_safetensors` takes them: on the CPU, contiguous, and each in
    memory of its own.
    """
    return {
        key: t.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for key, t in tensors.items()
    }


def write_text(text: str, path: str | os.PathLike[str], what: str) -> None:
    """Write a text file in the same way.

    Raises:
        CheckpointError: the file can't be written.
    """
    _atomic(path, what, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _atomic(path: str | os.PathLike[str], what: str, write: Callable[[Path], Any]) -> None:
    where = path_of(path, what)
    try:
        # A link stays a link, and what it points to is replaced.
        target = Path(os.path.realpath(where))
        check_replaceable(target, what)
        temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
        permissions = _created(temporary)
        if target.exists():
            permissions = stat.S_IMODE(target.stat().st_mode) & 0o777
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{what}: can't write in {os.path.dirname(where) or '.'}: {error}"
        ) from error
    try:
        os.chmod(temporary, 0o600)  # only its owner may read it until it is whole
        write(temporary)
        os.chmod(temporary, permissions)
        os.replace(temporary, target)
    except _WRITE_FAULTS as error:
        raise CheckpointError(f"{what}: can't write {where}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(target: Path, what: str) -> None:
    """Refuse a place where something stands that isn't a file.

    Raises:
        CheckpointError: a folder, a pipe or a device stands there.
    """
    if target.exists() and not target.is_file():
        found = "a folder" if target.is_dir() else "a pipe or a device"
        raise CheckpointError(f"{what}: can't write {target}: expected a file, found {found}")


def _created(path: Path) -> int:
    """Return the permissions that a new file gets here, found by making one."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)
