"""Parts of a file besides its method's: learned biases, modules trained whole, new rows."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import CheckpointError, short_repr
from ...core.site import Site
from ...layers.kinds import kind_of, matrix
from ...layers.weights import own_tensor, stored
from ...variants import BitFitConfig, FullConfig, LoRAConfig
from ..assembly import ModuleEntry, Part
from ..metadata import ConfigReader
from .extras_sorted import check_learned, check_saved, sorted_out
from .keys import elsewhere, first_name
from .modules import adaptable, refuse_tied
from .token_rows import read_rows

__all__ = ["read_extras"]


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
    found = sorted_out(reader, rest, modules)
    if base is None:
        if found.whole or found.biases or found.rows or found.copies:
            raise CheckpointError(
                f"{reader.where}: {short_repr(next(iter(rest)))} replaces a tensor of the base; "
                f"give the base model too"
            )
        return []
    check_saved(reader, found.whole, base)
    check_learned(reader, found.biases, found.rows, modules)
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
