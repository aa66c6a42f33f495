"""An adapter's folder as PEFT lays it out: its config, its tensors, keys to modules."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.errors import CheckpointError, short_repr
from ...io.file_kinds import form_of_tensors, not_an_adapter, reader_hint
from ...io.files import path_of, read_header, read_json, read_safetensors
from ...io.pickles import read_pickle
from ...io.swapping import interrupted
from ..metadata import ConfigReader

__all__ = ["CONFIG", "FILES", "TENSORS", "unpack"]

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FILES = (CONFIG, TENSORS, PICKLE)
_PICKLES = (".bin", ".pt", ".pth")
_SHARDS = "adapter_model-*-of-*.safetensors"  # as transformers saves a large one


def unpack(source: Any, config: Any) -> tuple[ConfigReader, dict[str, Tensor]]:
    """Return (config, tensors) of a folder, of the file in one, or of a state dict with its config.

    Raises:
        CheckpointError: something is missing, unreadable, or not what it should be.
    """
    if isinstance(source, Mapping):
        if config is None:
            raise CheckpointError(
                "a state dict doesn't say its method; give its config too: from_peft(tensors, "
                "model, config=...)"
            )
        if not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in source.items()):
            raise CheckpointError("expected a state dict, a mapping of names to tensors")
        # The tensors get memory of their own, because the model they came from may train on.
        return _config(config, "the config"), {k: t.detach().clone() for k, t in source.items()}
    try:
        path = Path(path_of(source, "from_peft"))
        folder = path if path.is_dir() else path.parent
        lost = not path.exists() and path.suffix not in (".safetensors", *_PICKLES)
        chosen = [path] if folder is not path and path.name != CONFIG else []
        usual = [folder / name for name in (TENSORS, PICKLE) if (folder / name).exists()]
        files = chosen or usual[:1] or sorted(folder.glob(_SHARDS))
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{short_repr(source)}: not a path: {error}") from None
    if lost:
        raise CheckpointError(
            f"{path}: no such folder; what is on a hub is downloaded first "
            f"(huggingface_hub.snapshot_download)"
        )
    if not files:
        raise CheckpointError(
            f"{path}: expected {TENSORS} or {PICKLE} in this folder, found neither"
            f"{interrupted(folder) or not_an_adapter(folder)}"
        )
    if config is None and not (folder / CONFIG).exists():
        raise CheckpointError(
            f"{path}: expected {CONFIG} beside the tensors, found none{interrupted(folder)}"
            f"{_other_reader(files[0])}{not_an_adapter(folder)}"
        )
    reader = _config(folder / CONFIG if config is None else config, str(folder / CONFIG))
    return reader, _tensors(files)


def _tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file, or of all the shards that it was saved in.

    Raises:
        CheckpointError: a file can't be read, a shard is missing, or two hold one tensor.
    """
    count = re.fullmatch(r".*-of-0*(\d+)", files[0].stem)
    if count is not None and files[0].match(_SHARDS) and int(count[1]) != len(files):
        raise CheckpointError(
            f"{files[0].parent}: expected {count[1]} files {_SHARDS}, found {len(files)}; take the "
            f"whole folder"
        )
    found: dict[str, Tensor] = {}
    for file in files:
        held = read_pickle(file) if file.suffix in _PICKLES else read_safetensors(file)[0]
        twice = next((key for key in held if key in found), None)
        if twice is not None:
            raise CheckpointError(f"{file}: {short_repr(twice)} is in another shard too")
        found |= held
    return found


def _other_reader(file: Path) -> str:
    """Return what reads a file of tensors that PEFT didn't write."""
    if file.suffix in _PICKLES:
        return ""
    keys, metadata = read_header(file)
    return reader_hint(keys, metadata) if form_of_tensors(keys, metadata) != "peft" else ""


def _config(config: Any, where: str) -> ConfigReader:
    if isinstance(config, (str, os.PathLike)):
        return ConfigReader(read_json(config), where)
    if not isinstance(config, Mapping):  # it is one of PEFT's own objects
        to_dict = getattr(config, "to_dict", None)
        config = to_dict() if callable(to_dict) else config
    if isinstance(config, Mapping):
        config = {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in config.items()}
        for name in ("peft_type", "task_type"):
            config[name] = getattr(config.get(name), "value", config.get(name))
    return ConfigReader(config, where)
