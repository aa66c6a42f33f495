"""Writing files so that nothing is lost or half there: beside the old ones, and moved when whole.

Faults are CheckpointErrors.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..core.errors import CheckpointError

__all__ = ["interrupted", "is_left_over", "swapped", "write_safetensors", "write_text"]

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

_LEFT_OVER = (".writing-*", ".merging-*")
"""Names of working folders; one that no process holds is what a killed one left."""
_WRITE_FAULTS = (OSError, safetensors.SafetensorError, ValueError, RuntimeError)


# --------------------------------------------------------------------------------------- one file
def write_safetensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    what: str,
) -> None:
    """Write tensors (contiguous, no shared storage) to a file: atomic, by writing beside it and
    renaming. A file that was there keeps its permissions.

    Raises:
        CheckpointError: it can't be written; beginning with `what`.
    """
    where = os.fsdecode(path)
    try:
        where.encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{what}: can't write {where!r}: its name isn't UTF-8, so that safetensors couldn't "
            f"read it again"
        ) from None
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
        _check_replaceable(target, what)
        beside = target.parent / f".{secrets.token_hex(8)}.tmp"
        permissions = _created(beside)
        if target.exists():
            permissions = stat.S_IMODE(target.stat().st_mode) & 0o777
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{what}: can't write in {os.path.dirname(where) or '.'}: {error}"
        ) from error
    try:
        os.chmod(beside, 0o600)  # its owner's alone until it is whole
        write(beside)
        os.chmod(beside, permissions)
        os.replace(beside, target)
    except _WRITE_FAULTS as error:
        raise CheckpointError(f"{what}: can't write {where}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _check_replaceable(target: Path, what: str) -> None:
    """Refuse a place where something stands that isn't a file.

    Raises:
        CheckpointError: a folder, a pipe or a device.
    """
    if target.exists() and not target.is_file():
        found = "a folder" if target.is_dir() else "a pipe or a device"
        raise CheckpointError(f"{what}: can't write {target}: expected a file, found {found}")


def _created(path: Path) -> int:
    """The permissions that a new file gets here, by making one."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)


# ----------------------------------------------------------------------- several files of a folder
@contextlib.contextmanager
def swapped(
    folder: str | os.PathLike[str],
    what: str,
    *,
    marker: str,
    gone: Sequence[str] = (),
    replace: bool = True,
    name: str = "writing",
) -> Iterator[Path]:
    """A working folder inside `folder`; its files take their places together when the block ends.

    An interruption leaves the old files, the new ones, or a folder without `marker`, which no
    loader reads. Other files of the folder stay. Working folders that killed processes left are
    removed, once the new files are in place.

    Args:
        folder: made if it isn't there; removed again if nothing comes of it.
        what: what messages begin with.
        marker: the file without which loaders read nothing: taken out first, put in last.
        gone: names of files that the new ones replace, under other names.
        replace: whether files of the same names are replaced; else they are an error.
        name: of the working folder.

    Raises:
        CheckpointError: it can't be written.
    """
    target = Path(os.fsdecode(folder))
    made: list[Path] = []
    try:
        made = [p for p in (target, *target.parents) if not p.exists()]
        target.mkdir(parents=True, exist_ok=True)
        work = target / f".{name}-{secrets.token_hex(6)}"
        with _held(target):
            work.mkdir()
            held = _locked(work)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what}: can't make {target}: {error}") from error
    try:
        yield work
        with _held(target):
            _swap(work, target, what, marker, gone, replace)
            made = []
            _remove_left_over(target, work)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{what}: can't write {target}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _unlock(held)
        for path in made:
            with contextlib.suppress(OSError):  # somebody else's files are in it
                path.rmdir()


def _swap(
    work: Path, target: Path, what: str, marker: str, gone: Sequence[str], replace: bool
) -> None:
    """Move the old files out, the marker first, and the new ones in, the marker last; back again
    where that fails.
    """
    names = sorted((entry.name for entry in work.iterdir()), key=lambda name: name == marker)
    present = [n for n in dict.fromkeys([marker, *names, *gone]) if os.path.lexists(target / n)]
    for name in present:
        _check_replaceable(target / name, what)
        if not replace:
            raise CheckpointError(f"{what}: {target / name} is there by now; nothing was changed")
        if name in names and (target / name).exists():
            os.chmod(work / name, stat.S_IMODE((target / name).stat().st_mode) & 0o777)
    old = work / "old"
    old.mkdir()
    moves = [(target / name, old / name) for name in present]
    moves += [(work / name, target / name) for name in names]
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            os.rename(source, destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            os.rename(destination, source)
        raise


def is_left_over(name: str) -> bool:
    """Whether a file's name is that of a working folder."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in _LEFT_OVER)


def interrupted(folder: Path) -> str:
    """What to say of a folder that lacks a file, where writing it was interrupted."""
    left = [entry for pattern in _LEFT_OVER for entry in folder.glob(pattern)]
    if not left:
        return ""
    return (
        f"; writing it was interrupted: files of the new one may be in {left[0].name} there, those "
        f"of the old one in {left[0].name}/old; move one set back, or write it again"
    )


def _remove_left_over(target: Path, own: Path) -> None:
    """Remove working folders that no process holds."""
    for pattern in _LEFT_OVER if fcntl is not None else ():
        for entry in target.glob(pattern):
            if entry == own or entry.is_symlink() or not entry.is_dir():
                continue
            held = _locked(entry)
            if held is not None:
                shutil.rmtree(entry, ignore_errors=True)
                _unlock(held)


def _locked(folder: Path, wait: bool = False) -> int | None:
    """A handle that holds a folder until it is closed; None where another process does, or the
    file system has no locks.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return handle
    except OSError:
        os.close(handle)
        return None


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One process at a time swaps files in a folder."""
    handle = _locked(folder, wait=True)
    try:
        yield
    finally:
        _unlock(handle)
