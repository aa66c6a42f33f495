"""Which tensors of a file aren't its method's, sorted by what each of them is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import CheckpointError, short_repr
from ...layers.tied import embeddings_of
from ...layers.weights import read_tensor, stored
from ..metadata import ConfigReader
from .completeness import in_one_of
from .keys import WRAPPED, elsewhere

__all__ = ["Extras", "check_learned", "check_saved", "sorted_out"]


@dataclass
class Extras:
    """What a file holds besides its method's tensors.

    Attributes:
        whole: {path of a parameter: values}, of modules that were trained whole.
        copies: {path of a parameter: values} of the base as the file was made.
        biases: {path of a module: its learned bias}.
        rows: {path of a module: new rows of its table}.
    """

    whole: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


def sorted_out(
    reader: ConfigReader, rest: Mapping[str, Tensor], modules: Mapping[str, Any]
) -> Extras:
    """Sort the tensors by what each of them is.

    Raises:
        CheckpointError: a tensor is nothing that is read here.
    """
    found = Extras()
    saved, learned = reader.names("modules_to_save"), reader.get("bias", "none") != "none"
    # PEFT also keeps a copy of what shares a tensor with a module trained whole.
    tying = reader.flag("ensure_weight_tying")
    for key, t in rest.items():
        path, _, name = key.rpartition(".")
        unwrapped = path.removesuffix(WRAPPED).removesuffix(".token_adapter")
        bare = unwrapped if unwrapped in modules else path.replace(WRAPPED, "")
        kept = in_one_of(saved, path) or (
            tying and any(in_one_of(saved, p.rpartition(".")[0]) for p in elsewhere(modules, key))
        )
        if ".original_module." in key and in_one_of(saved, path):
            continue  # bias="all" also keeps what a copy replaces
        if kept and _is_counted(modules, key, t):
            continue
        if kept:
            found.whole[key.replace(".modules_to_save.", ".")] = t
        elif name == "bias" and learned and reader.get("bias") is not None:
            found.biases[bare] = t
        elif name == "trainable_tokens_delta":
            found.rows[path.removesuffix(".token_adapter")] = t
        elif name in ("weight", "bias") and _is_copy(reader, bare, name, t, modules):
            if not _is_the_base(modules[bare], name, t):
                found.copies[f"{bare}.{name}"] = t
        else:
            raise CheckpointError(
                f"{reader.where}: unexpected tensor {short_repr(key)}; "
                f"{_unknown(modules, path, bare)}"
            )
    return found


def _is_counted(modules: Mapping[str, Any], key: str, t: Tensor) -> bool:
    """Tell whether a tensor is a buffer with the values that the model has."""
    parent, _, name = key.replace(".modules_to_save.", ".").rpartition(".")
    buffer = modules[parent]._buffers.get(name) if parent in modules else None
    return buffer is not None and buffer.shape == t.shape and torch.equal(buffer.to(t), t)


def _is_copy(
    reader: ConfigReader, path: str, name: str, t: Tensor, modules: Mapping[str, Any]
) -> bool:
    """Tell whether a tensor is PEFT's copy of a table or a head. PEFT keeps it with an embedding
    that is adapted or resized, and loads it in place of the base's.

    Raises:
        CheckpointError: its size isn't the model's.
    """
    module = modules.get(path)
    base = None if module is None else stored(module, name)
    if not isinstance(base, Tensor):
        return False
    model = modules[""]
    tables = [embeddings_of(model, "input"), embeddings_of(model, "output")]
    if base.shape == t.shape:
        return any(module is table for table in tables) or _is_the_base(module, name, t)
    if any(module is table for table in tables) and t.shape[1:] == base.shape[1:]:
        raise CheckpointError(
            f"{reader.where}: {path + '.' + name!r} has {len(t)} rows in the file and "
            f"{len(base)} in the model, whose vocabulary had been resized; do so first "
            f"(model.resize_token_embeddings({len(t)}))"
        )
    return False


def check_saved(reader: ConfigReader, whole: Iterable[str], model: nn.Module) -> None:
    """Refuse a file that has lost a module which its config says was trained whole.

    Raises:
        CheckpointError: the message names the module.
    """
    meant = [path for path, module in model.named_modules() if path and module.state_dict()]
    for name in reader.names("modules_to_save"):
        paths = [path for path in meant if path.endswith(name)]
        if paths and not any(f"{key}.".startswith(f"{path}.") for key in whole for path in paths):
            raise CheckpointError(
                f"{reader.where}: modules_to_save names {name!r}, which is {paths[0]!r} of the "
                f"model, and there is no tensor of it; take the "
                "whole folder, or the name out of the config if the base's own is meant"
            )


def check_learned(
    reader: ConfigReader, biases: Iterable[str], tokens: Iterable[str], modules: Mapping[str, Any]
) -> None:
    """Refuse a file that has lost something else which its config says was trained.

    Raises:
        CheckpointError: the message names the field.
    """
    has = next(
        (path for path, module in modules.items() if module._parameters.get("bias") is not None),
        None,
    )
    if reader.get("bias") == "all" and has is not None and not biases:
        raise CheckpointError(
            f"{reader.where}: bias is 'all', and there is no tensor of a bias, such as that of "
            f"{has!r}; take the whole folder"
        )
    if reader.get("trainable_token_indices") and not tokens:
        raise CheckpointError(
            f"{reader.where}: trainable_token_indices name tokens, and there is no tensor of "
            f"them; take the whole folder"
        )


def _is_the_base(module: Any, name: str, t: Tensor) -> bool:
    """Tell whether a tensor is the base's own, unchanged."""
    return torch.equal(read_tensor(module, name).to(t), t)


def _unknown(modules: Mapping[str, Any], path: str, bare: str) -> str:
    """Return what a message says of a tensor that isn't the base's own."""
    if not path.endswith(WRAPPED):
        return "nothing here corresponds to it"
    if not modules:
        return "if it is PEFT's copy of the base's, give the base model too"
    return (
        f"it isn't what {short_repr(bare)} of this model has: a copy of another base, or of one "
        f"that was trained or resized"
    )
