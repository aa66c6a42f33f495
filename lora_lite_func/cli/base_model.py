"""The model of a folder for verbs that have no adapter yet, with the paths that it has in use."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.errors import CheckpointError
from ..io.model_folder import meta_model
from ..io.shards import Shards
from .whole_model import known_class, sizes_of, weights_of

__all__ = ["base_sizes", "base_weights"]


def base_sizes(folder: str) -> nn.Module:
    """The folder's model by its sizes alone: as transformers makes it, else by the files' names.

    Raises:
        CheckpointError: not a readable folder of safetensors.
    """
    shards = Shards(folder)
    known = _known(shards)
    return meta_model(shards) if known is None else known[1]


def base_weights(shards: Shards, whole: bool = False) -> nn.Module:
    """The folder's model, whose weights are read when they are asked for, one at a time.

    Args:
        shards: the folder.
        whole: load it with transformers instead, for what needs its own modules (blocks, tables).
            That is also done where the names in the files aren't those of transformers' model.

    Raises:
        CheckpointError: transformers can't load it.
    """
    known = _known(shards)
    if known is None:
        return meta_model(shards)
    kind, sizes = known
    own = sizes.state_dict().keys()
    same = all(name in own for name, (shape, _) in shards.shapes.items() if len(shape) > 1)
    return weights_of(shards, kind, _why(shards)) if whole or not same else meta_model(shards)


def _known(shards: Shards) -> tuple[Any, nn.Module] | None:
    """(transformers' class, its model without weights), if it knows the folder's."""
    why = _why(shards)
    try:
        kind = known_class(shards, why)
        return kind, sizes_of(shards, kind, why)
    except CheckpointError:
        return None


def _why(shards: Shards) -> CheckpointError:
    return CheckpointError(f"{shards.folder}: the names in the files aren't enough")
