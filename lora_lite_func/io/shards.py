"""A model's folder as safetensors shards, read tensor by tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from ..core.errors import CheckpointError, short_repr
from .file_kinds import not_a_model
from .files import read_json
from .swapping import interrupted

__all__ = ["INDEX", "PLAIN", "Shards"]

INDEX = "model.safetensors.index.json"
PLAIN = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that aren't packed, as safetensors says them."""
_OWN = re.compile(r"(?:model|diffusion_pytorch_model)(?:-\d+-of-\d+)?\.safetensors")


class Shards(Mapping[str, str]):
    """The tensors of a model's folder: a mapping {tensor name: file name}.

    Attributes:
        folder: the folder's path.
        files: the names of the shards, in order.
        shapes: {tensor name: (shape, dtype as the file says it)}.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.fsdecode(folder))
        try:
            names = sorted(entry.name for entry in self.folder.iterdir() if entry.is_file())
        except (OSError, ValueError) as error:
            there = os.path.lexists(self.folder)
            hub = "; what is on a hub is downloaded first (huggingface_hub.snapshot_download)"
            raise CheckpointError(
                f"{self.folder}: not a readable folder: {error}{'' if there else hub}"
            ) from None
        placed = _index(self.folder) if INDEX in names else None
        self.files = _files(self.folder, names, placed)
        self.file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        for file in self.files:
            with self.open(file) as opened:
                self.metadata[file] = dict(opened.metadata() or {})
                for name in opened.keys():  # noqa: SIM118
                    if name in self.file_of:
                        raise CheckpointError(
                            f"{self.folder}: {short_repr(name)} is in {self.file_of[name]} and in "
                            f"{file}"
                        )
                    piece = opened.get_slice(name)
                    self.file_of[name], self.shapes[name] = (
                        file,
                        (tuple(piece.get_shape()), str(piece.get_dtype())),
                    )
        for name, file in (placed or {}).items():
            if name not in self.file_of:
                raise CheckpointError(f"{self.folder / INDEX}: {short_repr(name)} isn't in {file}")

    def __getitem__(self, name: str) -> str:
        return self.file_of[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)

    def open(self, file: str) -> Any:
        """Open a shard for reading.

        Raises:
            CheckpointError: the shard can't be read.
        """
        try:
            return safetensors.safe_open(str(self.folder / file), framework="pt")
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"{self.folder / file}: not a readable safetensors file: {error}"
            ) from error

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        with self.open(self.file_of[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def config(self) -> dict[str, Any]:
        """Return what the folder's config.json says, or an empty mapping where there is none.

        Raises:
            CheckpointError: the file can't be read.
        """
        if not (self.folder / "config.json").is_file():
            return {}
        says = read_json(self.folder / "config.json")
        return says if isinstance(says, dict) else {}


def _index(folder: Path) -> dict[str, Any]:
    """Return the index of the folder, which says what each tensor is in."""
    index = read_json(folder / INDEX)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{folder / INDEX}: expected a weight_map of tensors and files")
    return placed


def _files(folder: Path, names: list[str], placed: Mapping[str, Any] | None) -> list[str]:
    """Return the names of the shards. These are the files that the index names, which must be in
    this folder; without an index they are the model's own by their names, or else all that there
    are, except adapters.
    """
    if placed is not None:
        for file in placed.values():
            if (
                not isinstance(file, str)
                or not re.fullmatch(r"[\w.-]+\.safetensors", file)
                or file not in names
            ):
                raise CheckpointError(
                    f"{folder / INDEX}: {short_repr(file)} isn't a safetensors file in this folder"
                )
        return list(dict.fromkeys(placed.values()))
    found = [n for n in names if n.endswith(".safetensors") and not n.startswith(("adapter_", "."))]
    if not found:
        raise CheckpointError(
            f"{folder}: expected a model's safetensors files, found none"
            f"{interrupted(folder) or not_a_model(folder)}"
        )
    # Another precision, or another format, of the same model may stand beside it.
    return [name for name in found if _OWN.fullmatch(name)] or found
