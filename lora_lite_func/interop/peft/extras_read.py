"""What a file holds besides its method's tensors: biases, modules trained whole, new rows."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import CheckpointError, short_repr
from ...core.site import Site
from ...layers.kinds import kind_of, matrix
from ...layers.tied import embeddings_of
from ...layers.weights import held, own_tensor, stored
from ...variants import BitFitConfig, FullConfig, LoRAConfig
from ..assembly import ModuleEntry, Part
from ..metadata import ConfigReader
from .completeness import in_one_of
from .keys import WRAPPED, elsewhere, first_name
from .modules import adaptable, refuse_tied
from .token_rows import read_rows

__all__ = ["read_extras"]


@dataclass
class _Extras:
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


def read_extras(
    reader: ConfigReader, rest: Mapping[str, Tensor], model: Any, adapted: Container[str] = ()
) -> list[tuple[ModuleEntry, Part]]:
    """Read what a file holds besides its method's tensors: modules trained whole (modules_to_save),
    learned biases (bias="all", "lora_only"), new rows of tables, and tables of a resized base.

    Args:
        reader: the config.
        rest: the tensors that aren't the method's.
        model: the base, if it was given.
        adapted: the paths of the modules that the method adapts.

    Raises:
        CheckpointError: a tensor is none of these, a tensor needs the model and there is none, or
            what the config says was trained is missing.
    """
    base = model if isinstance(model, nn.Module) else None
    modules = {} if base is None else dict(base.named_modules(remove_duplicate=False))
    found = _sorted_out(reader, rest, modules)
    if base is None:
        if found.whole or found.biases or found.rows or found.copies:
            raise CheckpointError(
                f"{reader.where}: {short_repr(next(iter(rest)))} replaces a tensor of the base; "
                f"give the base model too"
            )
        return []
    _check_saved(reader, found.whole, base)
    _check_learned(reader, found.biases, found.rows, modules)
    apart = _apart(found.whole, modules)
    whole = _once(reader, {p: t for p, t in found.whole.items() if p not in apart}, modules)
    copies = _once(reader, found.copies, modules)
    for path in [path for path in copies if path.endswith(".bias")]:
        parent = path.removesuffix(".bias")
        if parent in adapted and f"{parent}.weight" not in copies:
            # The layer itself is adapted, so it stays as it is and its bias is shifted.
            found.biases[parent] = copies.pop(path)
    known = adaptable(base, [*whole, *copies, *found.biases])
    parts = [
        _whole(reader, path, t, *known[path], frozen=_is_buffer(modules, path))
        for path, t in whole.items()
    ]
    parts += [_whole(reader, path, t, *known[path], frozen=True) for path, t in copies.items()]
    parts += [_bias(reader, path, t, *known[path]) for path, t in found.biases.items()]
    parts += [_changed(reader, path, t, base) for path, t in apart.items()]
    return parts + read_rows(reader, found.rows, found.whole | found.copies, base)


def _apart(tensors: Mapping[str, Tensor], modules: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of layers that share theirs with other modules, where PEFT trained a copy
    for the layer alone.
    """
    found = {}
    for path, t in tensors.items():
        others = elsewhere(modules, path) if path.endswith(".weight") else []
        alike = all(o in tensors and torch.equal(t, tensors[o]) for o in others)
        kind = kind_of(modules[path.removesuffix(".weight")]) if not alike else None
        if kind is not None and kind.name in ("linear", "embedding"):
            found[path] = t
    return found


def _changed(
    reader: ConfigReader, path: str, t: Tensor, base: nn.Module
) -> tuple[ModuleEntry, Part]:
    """Read a layer's own weight as its change, a LoRA of full rank with an identity for the smaller
    factor. Other holders of the parameter don't have the change.
    """
    parent = path.removesuffix(".weight")
    site, module = adaptable(base, [parent])[parent]
    entry, weight = ModuleEntry(parent, {}, site, module), own_tensor(module, "weight")
    if weight is None or weight.shape != t.shape:
        raise _misfit(reader, path, weight, t)
    change = matrix(t.float() - weight.detach().float(), site)
    r = min(change.shape)
    one = torch.eye(r, device=change.device)
    A, B = (one, change) if change.shape[1] == r else (change, one)
    return entry, Part(LoRAConfig, {"lora_A": A, "lora_B": B}, {"rslora": False}, r, float(r))


def _once(
    reader: ConfigReader, tensors: Mapping[str, Tensor], modules: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return each parameter once, under the name that comes first in the model.

    Raises:
        CheckpointError: some of a parameter's places are missing, or they differ.
    """
    kept: dict[str, Tensor] = {}
    for path, t in tensors.items():
        refuse_tied(reader, modules, path, tensors)
        kept[first_name(modules, path)] = t
    return kept


def _is_buffer(modules: Mapping[str, Any], path: str) -> bool:
    """Tell whether a path is that of running statistics, which no gradient trains."""
    parent, _, name = path.rpartition(".")
    return name in modules[parent]._buffers


def _sorted_out(
    reader: ConfigReader, rest: Mapping[str, Tensor], modules: Mapping[str, Any]
) -> _Extras:
    """Sort the tensors by what each of them is.

    Raises:
        CheckpointError: a tensor is nothing that is read here.
    """
    found = _Extras()
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


def _check_saved(reader: ConfigReader, whole: Iterable[str], model: nn.Module) -> None:
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


def _check_learned(
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
    return torch.equal(held(module, name).to(t), t)


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


def _whole(
    reader: ConfigReader, path: str, t: Tensor, site: Site, module: Any, frozen: bool = False
) -> tuple[ModuleEntry, Part]:
    """Read a parameter that the file has in place of the base's, either trained (modules_to_save)
    or frozen. It takes its place before anything else is applied.
    """
    base = own_tensor(module, path.rpartition(".")[2])
    if base is None or base.shape != t.shape:
        raise _misfit(reader, path, base, t)
    if not t.is_floating_point():  # it is a counter, and parameters here are floating
        t = t.to(torch.float64)
    return ModuleEntry(path, {}, site, module), Part(
        FullConfig, {"lora_W": matrix(t, site)}, {"frozen": frozen}, order=-1
    )


def _misfit(reader: ConfigReader, path: str, base: Tensor | None, t: Tensor) -> CheckpointError:
    return CheckpointError(
        f"{reader.where}: {short_repr(path)}: expected shape "
        f"{None if base is None else tuple(base.shape)}, found {tuple(t.shape)}{_resized(base, t)}"
    )


def _resized(base: Tensor | None, t: Tensor) -> str:
    """Return what a message adds about a table, or a head, with another number of rows."""
    if base is None or base.ndim != 2 or t.ndim != 2 or base.shape[1] != t.shape[1]:
        return ""
    return (
        f"; where its vocabulary had been resized, do so first "
        f"(model.resize_token_embeddings({len(t)}))"
    )


def _bias(
    reader: ConfigReader, path: str, learned: Tensor, site: Site, module: Any
) -> tuple[ModuleEntry, Part]:
    """Read a learned bias as its difference from the base's, which a BitFit adds."""
    base = stored(module, "bias")
    if not isinstance(base, Tensor) or base.shape != learned.shape:
        raise CheckpointError(
            f"{reader.where}: {short_repr(path)} has no bias of shape {tuple(learned.shape)}"
        )
    return ModuleEntry(path, {}, site, module), Part(
        BitFitConfig, {"lora_b": learned - base.detach().to(learned)}, order=2
    )
