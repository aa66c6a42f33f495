"""An adapter's folder as PEFT lays it out: its config, its tensors, keys to modules."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.errors import CheckpointError, short_repr
from ...io.file_kinds import form_of_tensors, reader_hint
from ...io.files import read_header, read_json, read_safetensors
from ...io.pickles import read_pickle
from ...io.swapping import interrupted
from ..metadata import ConfigReader

__all__ = ["CONFIG", "FILES", "TENSORS", "split", "unpack"]

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FILES = (CONFIG, TENSORS, PICKLE)
_PICKLES = (".bin", ".pt", ".pth")
_NAMED = ".default"
_WRAPPERS = (".modules_to_save", "trainable_tokens_delta")
"""What PEFT puts its adapter's name behind, of no method's own."""
_PREFIX, _SHARED = "base_model.model.", "base_model."


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
        path = Path(os.fsdecode(source))
        folder = path if path.is_dir() else path.parent
        lost = not path.exists() and path.suffix not in (".safetensors", *_PICKLES)
        chosen = [path] if folder is not path and path.name != CONFIG else []
        files = chosen or [folder / name for name in (TENSORS, PICKLE) if (folder / name).exists()]
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{short_repr(source)}: not a path: {error}") from None
    if lost:
        raise CheckpointError(
            f"{path}: no such folder; what is on a hub is downloaded first "
            f"(huggingface_hub.snapshot_download)"
        )
    if not files:
        raise CheckpointError(
            f"{path}: expected {TENSORS} or {PICKLE} in this folder, found neither"
            f"{interrupted(folder)}"
        )
    if config is None and not (folder / CONFIG).exists():
        raise CheckpointError(
            f"{path}: expected {CONFIG} beside the tensors, found none{interrupted(folder)}"
            f"{_other_reader(files[0])}"
        )
    reader = _config(folder / CONFIG if config is None else config, str(folder / CONFIG))
    return reader, read_pickle(files[0]) if files[0].suffix in _PICKLES else read_safetensors(
        files[0]
    )[0]


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


def _ending(key: str, endings: Iterable[str]) -> tuple[str, str | None]:
    """Return (the key without an adapter's name, the method's suffix that it ends with)."""
    front, _, last = key.rpartition(".")
    for candidate in (key, key.removesuffix(_NAMED), f"{front.removesuffix(_NAMED)}.{last}"):
        found = next((e for e in endings if candidate.endswith("." + e)), None)
        if found is not None:
            return candidate, found
    for name in _WRAPPERS:
        key = key.replace(f"{name}{_NAMED}.", f"{name}.")
        key = key.removesuffix(_NAMED) if key.endswith(name + _NAMED) else key
    return key, None


def split(
    tensors: Mapping[str, Tensor], suffixes: Iterable[str], shared: Iterable[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Return ({path: {suffix: tensor}}, {shared name: tensor}, the rest by stripped key).

    A shared name that ends with a dot stands for all that begin with it.

    The longest suffix at a key's end counts, so a module may be called anything. The keys of a
    state dict that was never saved may still have the name of PEFT's own adapter (`default`) in
    them. It stands beside the suffix, where no module's name can be.

    Raises:
        CheckpointError: two keys mean the same tensor.
    """
    endings = sorted(suffixes, key=len, reverse=True)
    sites: dict[str, dict[str, Tensor]] = {}
    common: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    names = {name for name in shared if not name.endswith(".")}
    beginnings = tuple(name for name in shared if name.endswith("."))
    for key, t in tensors.items():
        outer = key.removeprefix(_SHARED)
        bare = outer.removesuffix(_NAMED)
        if bare in names or bare.startswith(beginnings):
            common[bare] = t
            continue
        stripped, ending = _ending(key.removeprefix(_PREFIX), endings)
        home, name = (
            (rest, stripped)
            if ending is None
            else (sites.setdefault(stripped[: -len(ending) - 1], {}), ending)
        )
        if name in home:
            raise CheckpointError(f"two tensors for {short_repr(stripped)}")
        home[name] = t
    return sites, common, rest
