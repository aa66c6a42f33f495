"""Files: one safetensors file per adapter, flat keys `<path>.<lora_name>`, config and sites as JSON metadata.

A file is hostile until shown otherwise: everything it says is checked before anything is built, no code is run, and a fault is a
CheckpointError that names what and where.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from .adapter import ABSENT, Adapter, Layout
from .config import AdapterConfig, from_dict, to_dict
from .errors import CheckpointError, ConfigError, LoraLiteError, nearest
from .layers import is_linear_like
from .spec import Site, Variant, site_for, variants

__all__ = ["load", "save"]

_KEY = "lora_lite_func"
_FORMAT = 1


def save(params: Adapter, path: str | os.PathLike[str]) -> None:
    """Write an adapter to one safetensors file: atomic (written beside, then renamed), exact for every dtype.

    Raises:
        CheckpointError: not an Adapter, a part of a partition, a stack, or the file can't be written.
    """
    if not isinstance(params, Adapter):
        raise CheckpointError(f"save: expected one Adapter, found {type(params).__name__}; several go to a file each")
    tensors = _flat(params)
    metadata = {_KEY: json.dumps(_describe(params.layout), separators=(",", ":"))}
    target = Path(path)
    try:
        handle, beside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise CheckpointError(f"save: can't write in {target.parent}: {error}") from error
    try:
        safetensors.torch.save_file(tensors, beside, metadata)
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, target)
    except (OSError, safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"save: can't write {target}: {error}") from error
    finally:
        Path(beside).unlink(missing_ok=True)


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> Adapter:
    """Read an adapter; needs no model, and checks sites and shapes against one if given.

    Args:
        path: the file.
        model: the base that it should fit.

    Raises:
        CheckpointError: not a safetensors file, truncated, no metadata, unknown variant or format version, a config or site with
            unknown or wrongly typed fields, missing, unexpected or mis-shaped tensors, or a site that `model` hasn't.
    """
    where = os.fspath(path)
    try:
        with safetensors.safe_open(where, framework="pt") as file:
            layout = _layout(_metadata(file.metadata(), where), where)
            keys = list(file.keys())
            _check_keys(layout, keys, where)
            # clones: aligned, so that products are bit-equal to those before the save, and independent of the file from here on
            data = {path: {name: file.get_tensor(_join(path, name)).clone() for name in names} for path, names in layout.names.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{where}: not a readable safetensors file: {error}") from error
    _check_tensors(layout, data, where)
    if model is not None:
        _check_model(layout, model, where)
    return Adapter(layout, data)


# ------------------------------------------------------------------------------------------------------------- writing
def _flat(params: Adapter) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    storages: set[int] = set()
    for path, expected in params.layout.expected.items():
        for name, leaf in params._data[path].items():
            if leaf is ABSENT:
                raise CheckpointError(f"save: {path!r} {name} is absent: this is one part of a partition; ll.combine the parts first")
            if not isinstance(leaf, Tensor) or tuple(leaf.shape) != expected[name]:
                found = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise CheckpointError(f"save: {path!r} {name}: expected a tensor of shape {expected[name]}, found {found}")
            leaf = leaf.detach().contiguous()
            start = leaf.untyped_storage().data_ptr()
            if start in storages or leaf.untyped_storage().nbytes() != leaf.nbytes:
                leaf = leaf.clone()  # safetensors refuses tensors that share storage
            storages.add(leaf.untyped_storage().data_ptr())
            flat[_join(path, name)] = leaf
    return flat


def _describe(layout: Layout) -> dict[str, Any]:
    sites = [[s.path, s.kind, s.d_in, s.d_out, s.bias] for s in layout.sites.values()]
    return {"format": _FORMAT, "variant": layout.variant.name, "config": to_dict(layout.config), "sites": sites}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ------------------------------------------------------------------------------------------------------------- reading
def _metadata(metadata: Mapping[str, str] | None, where: str) -> dict[str, Any]:
    if not metadata or _KEY not in metadata:
        raise CheckpointError(f"{where}: no {_KEY!r} entry in its metadata, so it isn't an adapter that ll.save wrote")
    try:
        described = json.loads(metadata[_KEY], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: its {_KEY!r} metadata isn't JSON: {error}") from None
    if not isinstance(described, dict):
        raise CheckpointError(f"{where}: its {_KEY!r} metadata: expected an object, found {type(described).__name__}")
    if described.get("format") != _FORMAT:
        raise CheckpointError(f"{where}: expected format version {_FORMAT}, found {described.get('format')!r}; a newer release may read it")
    odd = described.keys() ^ {"format", "variant", "config", "sites"}
    if odd:
        raise CheckpointError(f"{where}: its metadata should have format, variant, config, sites; odd: {', '.join(sorted(odd))}")
    return described


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key twice among {[key for key, _ in pairs]}")
    return found


def _layout(described: Mapping[str, Any], where: str) -> Layout:
    known = variants()
    name = described["variant"]
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f"{where}: unknown variant {name!r}; {nearest(str(name), known, first=50)} ll.register adds one")
    variant = known[name]
    try:
        cfg = from_dict(variant.config, described["config"])
    except ConfigError as error:
        raise CheckpointError(f"{where}: config: {error}") from None
    try:
        return Layout(variant, cfg, _sites(variant, cfg, described["sites"], where))
    except (LoraLiteError, OverflowError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{where}: sites: {error}") from None


def _sites(variant: Variant, cfg: AdapterConfig, rows: Any, where: str) -> list[Site]:
    twins: dict[float, Tensor] = {}
    sites: dict[str, Site] = {}
    for row in rows if isinstance(rows, list) else [rows]:
        if not _is_site(row):
            raise CheckpointError(f"{where}: a site should be [path, kind, d_in, d_out, bias], found {str(row)[:200]}")
        path, kind, d_in, d_out, bias = row
        if path in sites:
            raise CheckpointError(f"{where}: site {path!r} is listed twice")
        if kind not in variant.sites:
            raise CheckpointError(f"{where}: site {path!r}: {variant.name} can't adapt a {kind!r}")
        sites[path] = site_for(variant, cfg, path, d_in, d_out, bias=bias, kind=kind, twins=twins)
    return list(sites.values())


def _is_site(row: Any) -> bool:
    return (
        isinstance(row, list)
        and [type(v) for v in row] == [str, str, int, int, bool]
        and row[2] > 0
        and row[3] > 0
        and max(row[2], row[3]) < 2**40
    )


def _check_keys(layout: Layout, keys: list[str], where: str) -> None:
    expected = {_join(path, name) for path, names in layout.names.items() for name in names}
    if len(expected) != sum(map(len, layout.names.values())):
        raise CheckpointError(f"{where}: two sites give tensors the same key")
    found = set(keys)
    if expected - found:
        raise CheckpointError(f"{where}: missing {len(expected - found)} tensors, first: {min(expected - found)!r}")
    if found - expected:
        odd = min(found - expected)
        raise CheckpointError(f"{where}: {len(found - expected)} unexpected tensors, first: {odd!r}; {nearest(odd, sorted(expected))}")


def _check_tensors(layout: Layout, data: Mapping[str, Mapping[str, Tensor]], where: str) -> None:
    for path, expected in layout.expected.items():
        for name, tensor in data[path].items():
            if tuple(tensor.shape) != expected[name]:
                raise CheckpointError(f"{where}: {_join(path, name)!r}: expected shape {expected[name]}, found {tuple(tensor.shape)}")
            least = layout.least[path][name]
            if tensor.is_floating_point() != (least is None or least.is_floating_point) or tensor.is_complex():
                kind = "floating" if least is None else str(least)
                raise CheckpointError(f"{where}: {_join(path, name)!r}: expected a {kind} tensor, found {tensor.dtype}")


def _check_model(layout: Layout, model: nn.Module, where: str) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, site in layout.sites.items():
        module: Any = modules.get(path)
        if module is None or not is_linear_like(module):
            raise CheckpointError(f"{where}: {type(model).__name__} has no linear-like module {path!r}; {nearest(path, modules)}")
        if (module.in_features, module.out_features) != (site.d_in, site.d_out):
            found = f"{module.in_features} -> {module.out_features}"
            raise CheckpointError(f"{where}: site {path!r}: expected {site.d_in} -> {site.d_out}, the model has {found}")
