"""Opening whatever holds an adapter: a file of ll.save, a PEFT folder, or another tool's file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.errors import CheckpointError
from ..io.checkpoint import IN_FOLDERS, OWN, Saved, load
from ..io.checks import check_model
from ..io.file_kinds import not_an_adapter
from ..io.files import read_header
from .assembly import ModelNeededError
from .diffusion import from_diffusion
from .diffusion.keys import split_role
from .lora_lite import from_lora_lite
from .peft.folder import CONFIG, unpack
from .peft.read import from_unpacked
from .renaming import Rename

__all__ = ["form_of", "open_adapter"]


def form_of(path: str | os.PathLike[str]) -> str:
    """Return the form of a file or folder: "peft" where an adapter_config.json is, "lora_lite" or
    "diffusion" by what a safetensors file's header says, and otherwise "ll"; of a folder, "ll"
    where a bound model's `save_pretrained` wrote it.

    Raises:
        CheckpointError: the path can't be looked at, or is a folder that isn't PEFT's.
    """
    here = Path(os.fsdecode(path))
    try:
        folder = here if here.is_dir() else here.parent
        if (folder / CONFIG).is_file() and (here.is_dir() or here.name.startswith("adapter_model")):
            return "peft"
        if not here.is_dir():
            return _form_of_file(here)
        form = _form_of_file(here / IN_FOLDERS)
        if not (here / IN_FOLDERS).is_file() or form != "ll":
            raise CheckpointError(
                f"{here}: a folder without {CONFIG}, so no PEFT adapter"
                + (not_an_adapter(here) or "; an adapter's file of this library is named itself")
            )
        return form
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{here}: {error}") from None


def _form_of_file(path: Path) -> str:
    if path.suffix == ".bin":
        return "diffusion"
    if not path.is_file():
        return "ll"
    try:
        keys, metadata = read_header(path)
    except CheckpointError:
        return "ll"  # its reader then says what is wrong
    if OWN in metadata:
        return "ll"
    if "cfg" in metadata:
        return "lora_lite"
    return "diffusion" if any(split_role(key) is not None for key in keys) else "ll"


def open_adapter(
    path: str | os.PathLike[str],
    model: nn.Module | Callable[..., nn.Module] | None = None,
    *,
    component: str | None = None,
    rename: Rename | None = None,
) -> Saved:
    """Read the adapter in a file or folder of any form.

    Args:
        path: the file or folder.
        model: the base; or a function that makes a copy of it without values, given what the
            adapter's form says (`transposed`, `embeddings`, `upwards`).
        component: the component of a diffusion model's file whose keys are read.
        rename: for paths that have moved, as in `from_peft` and `from_diffusion`.

    Raises:
        CheckpointError: the adapter can't be read, or doesn't fit.
    """
    form = form_of(path)
    if rename is not None and form not in ("peft", "diffusion"):
        raise CheckpointError(
            f"{os.fsdecode(path)}: rename is for files of PEFT's and of diffusion models"
        )
    if form in ("lora_lite", "diffusion"):
        return _of_others(path, form, _base(model), component, rename)
    if form == "peft":
        reader, tensors = unpack(path, None)
        if callable(model) and not isinstance(model, nn.Module):
            tables = _tables(tensors)
            model = model(
                transposed=True if reader.get("fan_in_fan_out") is True else None, embeddings=tables
            )
        return from_unpacked(reader, tensors, model, rename=rename)
    saved: Saved
    if not callable(model) or isinstance(model, nn.Module):
        saved = load(path, model)
        return saved
    saved = load(path)
    parts: list[Adapter] = (
        [saved]
        if isinstance(saved, Adapter)
        else list(saved.values() if isinstance(saved, dict) else saved)
    )
    sites = [site for part in parts for site in part.sites.values()]
    upwards = {s.path: s.d_out for s in sites if s.kind == "conv" and s.transposed}
    tables = [s.path for s in sites if s.kind == "embedding"]
    base = model(transposed=_transposed(sites), embeddings=tables, upwards=upwards)
    try:
        for part in parts:
            check_model(part.layout, base)
    except CheckpointError as error:
        raise CheckpointError(f"{os.fsdecode(path)}: {error}") from None
    return saved


def _base(model: nn.Module | Callable[..., nn.Module] | None) -> nn.Module | None:
    if model is None or isinstance(model, nn.Module):
        return model
    return model()


def _of_others(
    path: str | os.PathLike[str],
    form: str,
    model: nn.Module | None,
    component: str | None,
    rename: Rename | None,
) -> Saved:
    if form == "lora_lite":
        return from_lora_lite(path, model)
    if model is None:
        raise ModelNeededError(
            f"{os.fsdecode(path)}: the names in a diffusion model's file are found in the model; "
            f"give the base model too"
        )
    return from_diffusion(path, model, component=component, rename=rename)


def _tables(tensors: Mapping[str, Tensor]) -> list[str]:
    ends = (".lora_embedding_A", ".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")
    bare = [key.removeprefix("base_model.model.") for key in tensors]
    return [key.removesuffix(end) for key in bare for end in ends if key.endswith(end)]


def _transposed(sites: list[Any]) -> bool | None:
    linear = [s.transposed for s in sites if s.kind == "linear"]
    return linear[0] if linear else None
