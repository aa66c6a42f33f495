"""Opening whatever holds an adapter: a file of ll.save, a PEFT folder, other tools' files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.errors import CheckpointError
from ..io.checkpoint import Saved, load
from .peft import from_peft
from .peft.folder import CONFIG, unpack

__all__ = ["form_of", "open_adapter"]


def form_of(path: str | os.PathLike[str]) -> str:
    """Which form a file or folder has: "peft" where an adapter_config.json is, else "ll".

    Raises:
        CheckpointError: not a path.
    """
    here = Path(os.fsdecode(path))
    try:
        folder = here if here.is_dir() else here.parent
        if (folder / CONFIG).is_file() and (here.is_dir() or here.name.startswith("adapter_model")):
            return "peft"
        if here.is_dir():
            raise CheckpointError(
                f"{here}: a folder without {CONFIG}, so no PEFT adapter; an adapter's file of "
                f"this library is named itself"
            )
        return "ll"
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{here}: {error}") from None


def open_adapter(
    path: str | os.PathLike[str], model: nn.Module | Callable[..., nn.Module] | None = None
) -> Saved:
    """The adapter in a file or folder.

    Args:
        path: of it.
        model: the base, or what makes a skeleton of it, given what the adapter's form says:
            `transposed`, `embeddings`.

    Raises:
        CheckpointError: it can't be read, or doesn't fit.
    """
    if form_of(path) == "peft":
        if callable(model) and not isinstance(model, nn.Module):
            reader, tensors = unpack(path, None)
            tables = _tables(tensors)
            model = model(
                transposed=True if reader.get("fan_in_fan_out") is True else None, embeddings=tables
            )
        return from_peft(path, model)
    if not callable(model) or isinstance(model, nn.Module):
        return _typed(load(path, model))
    saved = _typed(load(path))
    parts: list[Adapter] = (
        [saved]
        if isinstance(saved, Adapter)
        else list(saved.values() if isinstance(saved, dict) else saved)
    )
    sites = [site for part in parts for site in part.sites.values()]
    upwards = {s.path: s.d_out for s in sites if s.kind == "conv" and s.transposed}
    tables = [s.path for s in sites if s.kind == "embedding"]
    load(
        path, model(transposed=_transposed(sites), embeddings=tables, upwards=upwards)
    )  # refuses a misfit
    return saved


def _typed(found: Any) -> Saved:
    saved: Saved = found
    return saved


def _tables(tensors: Mapping[str, Tensor]) -> list[str]:
    ends = (".lora_embedding_A", ".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")
    bare = [key.removeprefix("base_model.model.") for key in tensors]
    return [key.removesuffix(end) for key in bare for end in ends if key.endswith(end)]


def _transposed(sites: list[Any]) -> bool | None:
    linear = [s.transposed for s in sites if s.kind == "linear"]
    return linear[0] if linear else None
