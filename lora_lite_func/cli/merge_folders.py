"""Checks of the folders that merge reads and writes."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import CheckpointError, UnsupportedError
from ..io.shards import INDEX, Shards
from ..io.swapping import is_left_over, swapped
from .health import not_finite

__all__ = ["check_finite", "check_out", "merged_into", "others"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_MODEL = re.compile(
    r"(?:model|pytorch_model|diffusion_pytorch_model)(?:-\d+-of-\d+)?"
    r"\.(?:safetensors|bin)(?:\.index\.json)?"
)
"""Names of a model's files, in one or in shards."""


def others(folder: Path) -> list[Path]:
    """Return the base's other files, such as config and tokenizer, which are copied as they are.

    Raises:
        CheckpointError: one is a link to a file elsewhere, whose contents would be copied out. The
            links of the hub's cache to its own blobs are allowed.
    """
    found = [
        f
        for f in sorted(folder.iterdir())
        if f.is_file()
        and not f.name.endswith(_WEIGHTS)
        and not f.name.startswith("adapter_")
        and not re.search(r"\.index\.\w+\.json$", f.name)  # it is of another precision
    ]
    parents = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    for file in found:
        if file.resolve().parent not in parents:
            raise CheckpointError(
                f"{file}: a link that leads out of its folder; put a copy of the file there, or "
                f"remove it"
            )
    return found


def check_out(base: Path, target: Path, force: bool) -> None:
    """Refuse an output that is the base, isn't a folder, or holds files that must not be lost, or
    that would be read beside the merged model.

    Raises:
        CheckpointError: the message names a way out.
    """
    try:
        if target.exists() and target.samefile(base):
            raise CheckpointError(f"{target}: is the base itself; merge into another folder")
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{target}: expected a folder")
        names = _names(target)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{target}: {error}") from None
    if names and not force:
        raise CheckpointError(
            f"{target}: isn't empty; choose another folder, or --force to replace files of "
            f"the same names and another model's weights"
        )
    odd = [n for n in names if n.endswith(".safetensors") and not _MODEL.fullmatch(n)]
    odd += [n for n in names if n.startswith("adapter_")]
    if odd:
        raise CheckpointError(
            f"{target}: holds {odd[0]!r}, which loaders would read beside the merged model; choose "
            f"another folder, or move the file away"
        )


def _names(target: Path) -> list[str]:
    """Return the names in a folder, apart from what a killed run left."""
    if not target.is_dir():
        return []
    return sorted(entry.name for entry in target.iterdir() if not is_left_over(entry.name))


def check_finite(params: object, force: bool) -> None:
    """Refuse to merge NaN or infinity into a model.

    Raises:
        UnsupportedError: the message names the first such tensor.
    """
    odd = not_finite(params)
    if odd and not force:
        raise UnsupportedError(
            f"{odd[0]!r} holds NaN or infinity ({len(odd)} tensors in all), and so would the "
            f"merged model; --force merges it all the same"
        )


@contextmanager
def merged_into(target: Path, shards: Shards, force: bool) -> Iterator[Path]:
    """Open a working folder whose files become the target's. Weights of another layout are
    removed.
    """
    present = {entry.name for entry in shards.folder.iterdir()}
    marker = next((n for n in ("config.json", INDEX) if n in present), shards.files[-1])
    gone = [name for name in _names(target) if _MODEL.fullmatch(name)]
    with swapped(
        os.fspath(target), "merge", marker=marker, gone=gone, replace=force, name="merging"
    ) as work:
        yield work
        private = stat.S_IMODE((shards.folder / shards.files[0]).stat().st_mode) & 0o777
        # The new shards get the permissions of the base's, which they are made of.
        for file in work.glob("*.safetensors"):
            file.chmod(private)
