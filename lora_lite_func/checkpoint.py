"""Files: one safetensors file per adapter, flat keys `<path>.<lora_name>`, its layout as JSON metadata.

A file is hostile until shown otherwise: everything it says is checked before anything is built, no code is run, and a fault is a
CheckpointError that names what and where.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from .adapter import ABSENT, Adapter
from .errors import CheckpointError, nearest, shown
from .kinds import KINDS, misfit, place
from .layout import Layout, describe, described
from .spec import fits

__all__ = ["load", "save"]

_KEY = "lora_lite_func"


def save(params: Adapter, path: str | os.PathLike[str]) -> None:
    """Write an adapter to one safetensors file: atomic (written beside, then renamed), exact for every dtype.

    Raises:
        CheckpointError: not an Adapter, a part of a partition, a stack, tensors without storage (sparse, or of a transform), or the
            file can't be written.
    """
    if not isinstance(params, Adapter):
        raise CheckpointError(f"save: expected one Adapter, found {type(params).__name__}; several go to a file each")
    where = os.fsdecode(path)
    tensors = _flat(params)
    metadata = {_KEY: json.dumps(describe(params.layout), separators=(",", ":"))}
    try:
        target = Path(os.path.realpath(where))  # a link stays one: what it points to is replaced
        beside = target.parent / f".{secrets.token_hex(8)}.tmp"
        rights = _created(beside)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"save: can't write in {os.path.dirname(where) or '.'}: {error}") from error
    try:
        safetensors.torch.save_file(tensors, beside, metadata)
        os.chmod(beside, rights)
        os.replace(beside, target)
    except (OSError, safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"save: can't write {where}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> Adapter:
    """Read an adapter; needs no model, and checks sites and shapes against one if given.

    Args:
        path: the file.
        model: the base that it should fit.

    Raises:
        CheckpointError: not a safetensors file, truncated, no metadata, unknown variant or format version, a config or site with
            missing, unknown or wrongly typed fields, missing, unexpected, mis-shaped or mis-typed tensors, or a site that `model` hasn't.
    """
    where = os.fsdecode(path)
    says, tensors = _read(where)
    try:
        layout = _layout(says, len(tensors))
        _check_keys(layout, tensors)
        data = {path: {name: tensors[_join(path, name)] for name in names} for path, names in layout.names.items()}
        for path, held in data.items():
            for name, tensor in held.items():
                _check_tensor(layout, path, name, tensor)
        if model is not None:
            _check_model(layout, model)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return Adapter(layout, data)


# ------------------------------------------------------------------------------------------------------------- writing
def _flat(params: Adapter) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    storages: set[int] = set()
    for path, held in params._data.items():
        for name, leaf in held.items():
            try:
                _check_tensor(params.layout, path, name, leaf)
                flat[_join(path, name)] = _stored(leaf.detach().contiguous(), storages)
            except CheckpointError as error:
                raise CheckpointError(f"save: {error}") from None
            except RuntimeError as error:
                raise CheckpointError(f"save: {path!r} {name} has no storage (sparse, or inside a transform): {error}") from error
    return flat


def _created(path: Path) -> int:
    """The rights a new file gets here, by making one; safetensors gives its own fewer."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)


def _stored(leaf: Tensor, storages: set[int]) -> Tensor:
    """A tensor that fills a storage of its own: safetensors refuses others."""
    start = leaf.untyped_storage().data_ptr()
    if start in storages or leaf.untyped_storage().nbytes() != leaf.nbytes:
        leaf = leaf.clone()
    storages.add(leaf.untyped_storage().data_ptr())
    return leaf


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# ------------------------------------------------------------------------------------------------------------- reading
def _read(where: str) -> tuple[str | None, dict[str, Tensor]]:
    """(what the file says of itself, its tensors); no tensors where it says nothing."""
    try:
        with safetensors.safe_open(where, framework="pt") as file:
            says = (file.metadata() or {}).get(_KEY)
            # clones: aligned, so that products are bit-equal to those before the save, and independent of the file from here on
            tensors = {} if says is None else {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{where}: not a readable safetensors file: {error}") from error
    return says, tensors


def _layout(says: str | None, count: int) -> Layout:
    if says is None:
        raise CheckpointError(f"no {_KEY!r} entry in its metadata, so it isn't an adapter that ll.save wrote")
    try:
        parsed = json.loads(says, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its {_KEY!r} metadata isn't JSON: {error}") from None
    return described(parsed, most=count)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key twice among {shown([key for key, _ in pairs])}")
    return found


def _check_keys(layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    expected = {_join(path, name) for path, names in layout.names.items() for name in names}
    if len(expected) != sum(map(len, layout.names.values())):
        raise CheckpointError("two sites give tensors the same key")
    missing, odd = expected - tensors.keys(), tensors.keys() - expected
    if missing:
        raise CheckpointError(f"missing {len(missing)} tensors, first: {shown(min(missing))}")
    if odd:
        raise CheckpointError(f"{len(odd)} unexpected tensors, first: {shown(min(odd))}; {nearest(min(odd), sorted(expected))}")


def _check_tensor(layout: Layout, path: str, name: str, leaf: Any) -> None:
    shape, least = layout.expected[path][name], layout.least[path][name]
    if leaf is ABSENT:
        raise CheckpointError(f"{shown(path)} {name} is absent: this is one part of a partition; ll.combine the parts first")
    if not isinstance(leaf, Tensor) or tuple(leaf.shape) != shape:
        found = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
        raise CheckpointError(f"{shown(path)} {name}: expected a tensor of shape {shape}, found {found}")
    if not fits(least, leaf.dtype):
        kind = f"{'floating' if least is None else least} tensor, found {leaf.dtype}"
        wide = "" if least is not None and not least.is_floating_point else f"; {'16 bits' if least is None else least} at least"
        raise CheckpointError(f"{shown(path)} {name}: expected a {kind}{wide}")


def _check_model(layout: Layout, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"expected an nn.Module to check it against, found {type(model).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, site in layout.sites.items():
        module: Any = modules.get(place(site)[0])
        kind = KINDS[site.kind]
        if module is None or not (kind.bare or kind.holds(module)):
            raise CheckpointError(f"{type(model).__name__} has no {kind.one} {shown(path)}; {nearest(path, modules)}")
        wrong = misfit(site, module)
        if wrong is not None:
            raise CheckpointError(f"site {shown(path)}: expected {wrong[0]}, the model has {wrong[1]}")
