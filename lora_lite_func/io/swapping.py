"""Several files of a folder, written together. An interruption leaves the old files, the new ones,
or a folder that no loader reads.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import safetensors

from ..core.errors import CheckpointError
from .files import path_of
from .writing import check_replaceable

__all__ = ["interrupted", "is_left_over", "swapped"]

try:
    import fcntl
except ImportError:  # the system isn't POSIX
    fcntl = None  # type: ignore[assignment]

_LEFT_OVER = (".writing-*", ".merging-*")
"""Names of working folders; one that no process holds is what a killed one left."""


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
    """Open a working folder inside `folder`. Its files take their places together when the block
    ends.

    An interruption leaves the old files, the new ones, or a folder without `marker`, which no
    loader reads. Other files of the folder stay. Once the new files are in place, working folders
    that killed processes left behind are removed.

    Args:
        folder: the target. It is made if it isn't there, and removed again if nothing comes of it.
        what: what messages begin with.
        marker: the file without which loaders read nothing. It is taken out first and put in last.
        gone: names of files that the new ones replace under other names.
        replace: whether files of the same names are replaced. Otherwise they are an error.
        name: the name of the working folder.

    Raises:
        CheckpointError: the folder can't be written.
    """
    target = Path(path_of(folder, what))
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
            with contextlib.suppress(OSError):  # the folder stays if it holds somebody else's files
                path.rmdir()


def _swap(
    work: Path, target: Path, what: str, marker: str, gone: Sequence[str], replace: bool
) -> None:
    """Move the old files out, the marker first, and the new files in, the marker last. Where that
    fails, the old files are moved back.
    """
    names = sorted((entry.name for entry in work.iterdir()), key=lambda name: name == marker)
    present = [n for n in dict.fromkeys([marker, *names, *gone]) if os.path.lexists(target / n)]
    for name in present:
        check_replaceable(target / name, what)
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
    """Tell whether a file's name is that of a working folder."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in _LEFT_OVER)


def interrupted(folder: Path) -> str:
    """Return what a message says of a folder that lacks a file because writing it was
    interrupted.
    """
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
    """Return a handle that holds a folder until it is closed. The result is None where another
    process holds the folder, or where the file system has no locks.
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
    """Let only one process at a time swap files in a folder."""
    handle = _locked(folder, wait=True)
    try:
        yield
    finally:
        _unlock(handle)
