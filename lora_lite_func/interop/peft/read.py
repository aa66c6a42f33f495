"""from_peft: what PEFT saved, as adapters. PEFT itself isn't needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.errors import (
    CheckpointError,
    ConfigError,
    LoraLiteError,
    nearest,
    short_repr,
)
from ...layers.kinds import KINDS
from ..assembly import ModuleEntry, Part, assemble, check_tensors, widened
from ..metadata import ConfigReader
from ..renaming import Paths, Rename
from .arrow import is_router, read_router
from .codec import Codec
from .completeness import in_one_of, refuse_emptied
from .experts import stacked_experts
from .extras_read import read_extras
from .folder import unpack
from .keys import WRAPPED
from .methods import METHODS
from .modules import entries_of, refuse_tied
from .padding import as_one_table, padding_checked
from .replaced import multiplied, on_its_copy, on_tables, refuse_unheard
from .state_keys import split
from .whole_model import of_whole_model, whole_model_entry

__all__ = ["from_peft", "from_unpacked"]


def from_peft(
    source: Any,
    model: nn.Module | None = None,
    *,
    config: Any = None,
    ignore: Iterable[str] = (),
    rename: Rename | None = None,
    experts: Sequence[Any] = (),
    general: Sequence[Any] = (),
) -> Adapter | tuple[Adapter, ...]:
    """Read an adapter that PEFT saved: `params = ll.from_peft("folder", model)`. Where one file
    holds several things (a learned bias besides the factors, settings that differ by layer), the
    result is a tuple, which `apply`, `bind` and `merge` take as it is.

    Nothing is dropped: what has no counterpart here is an error that names it.

    Args:
        source: a folder with adapter_config.json and adapter_model.safetensors (or .bin, read
            without running code), the file in it, or a state dict (then with `config`).
        model: the base. LoRA, LoHa, LoKr, AdaLoRA, HiRA and C3A can do without. Methods whose
            tensors show one side of a layer only, or whose meaning depends on the base weights
            (DoRA, PiSSA), can't. With a model, keys that match nothing in it are refused.
        config: the config as a mapping, a path or PEFT's own object, where it isn't beside the
            tensors.
        ignore: fields of the config to leave out of account. These can be fields to which nothing
            here corresponds, and dropout, which here acts only on what comes to a layer's call
            (`ignore="lora_dropout"` lets an adapter of convolutions be trained further).
        rename: for a model whose modules have moved since: {old names: new names}, names of a path
            in a row (`{"model.layers": "model.language_model.layers"}`), or a function from a
            file's path to the model's. Moves that transformers made (a language model into another
            module, or out of it; experts stacked) are followed without it, where they leave one
            possibility.
        experts: of an Arrow router's folder, the folders (or adapters) of the experts, in order.
        general: likewise, those whose knowledge is taken out of the experts (GenKnowSub).

    Raises:
        CheckpointError: the file is unreadable, its method is unknown, a field or key can't be
            honoured, or tensors are missing or of the wrong shape.
        UnsupportedError: the method can't adapt a layer here.
    """
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    reader, tensors = unpack(source, config)
    if is_router(reader):
        return read_router(
            reader,
            experts,
            general,
            lambda folder: from_peft(folder, model, ignore=ignore, rename=rename),
        )
    if experts or general:
        raise CheckpointError(
            f"{reader.where}: experts: this isn't an Arrow router's folder, which alone needs them"
        )
    return from_unpacked(reader, tensors, model, ignore=ignore, rename=rename)


def from_unpacked(
    reader: ConfigReader,
    tensors: Mapping[str, Tensor],
    model: nn.Module | None,
    *,
    ignore: Sequence[str] = (),
    rename: Rename | None = None,
) -> Adapter | tuple[Adapter, ...]:
    """Read an adapter as `from_peft` does, of what `unpack` returned.

    Raises:
        CheckpointError, UnsupportedError: as `from_peft`.
    """
    if is_router(reader):
        return read_router(reader, (), (), from_peft)
    method = _method(reader)
    understood = method.understood.split()
    of_training = method.ignored.split()
    reader.check([*understood, *of_training], ignore, method.unread.split())
    reader = reader.without(ignore, understood, of_training)
    if method.names_ending:
        listed = reader.names("target_modules")
        reader = ConfigReader({**reader, "target_modules": listed}, reader.where)
    tensors = {key: widened(t) for key, t in tensors.items() if not _is_left(key, method.leftovers)}
    refuse_emptied(reader, tensors)
    check_tensors({k: t for k, t in tensors.items() if not _is_counter(reader, k, t, model)})
    own: dict[str, Tensor] = {}
    if method.of_whole_model:
        own, tensors = of_whole_model(tensors, method.suffixes)
    suffixes = () if method.of_whole_model else method.suffixes
    sites, shared, rest = split(tensors, suffixes, method.shared)
    if own:
        sites = {"": own}
    if not sites and shared and method.unsaid:
        raise CheckpointError(f"{reader.where}: {method.unsaid}")
    if not sites and not rest:
        raise CheckpointError(
            f"{reader.where}: no tensor of a {method.peft_type} adapter beside it"
        )
    try:
        placed = _placed(reader, method, sites, shared, rest, model, rename)
        found = assemble(placed)
        refuse_unheard(reader, [entry for entry, _ in placed if entry.unheard], found)
        return found
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{reader.where}: a module of this {method.peft_type} adapter lacks the tensor "
            f"{short_repr(error.args[0])}"
        ) from None
    except ConfigError as error:
        raise CheckpointError(f"{reader.where}: {error}") from None


def _method(reader: ConfigReader) -> Codec:
    """Return the file's method.

    Raises:
        CheckpointError: the method isn't read, or learns biases in a way that PEFT lacks.
    """
    kind = reader.text("peft_type").upper()
    if kind == "XLORA":
        raise CheckpointError(
            f"{reader.where}: an X-LoRA is more than an adapter; read it with "
            f"ll.xlora_from_peft(folder, model)"
        )
    if kind == "SHADOW":
        raise CheckpointError(
            f"{reader.where}: a shadow network beside the model is no adapter of its layers, and "
            f"can't be merged; it runs in PEFT alone"
        )
    if kind not in METHODS:
        raise CheckpointError(
            f"{reader.where}: peft_type {short_repr(kind)} isn't read here; "
            f"{nearest(kind, METHODS, first=50)}"
        )
    method = METHODS[kind]
    if reader.get("bias") not in (None, "none", "all", method.biased):
        raise reader.refuse(
            "bias", " or ".join(map(repr, filter(None, ("none", "all", method.biased))))
        )
    return method


def _placed(
    reader: ConfigReader,
    method: Codec,
    sites: Mapping[str, Mapping[str, Tensor]],
    shared: Mapping[str, Tensor],
    rest: Mapping[str, Tensor],
    model: Any,
    rename: Rename | None,
) -> list[tuple[ModuleEntry, Part]]:
    """Return everything that a file holds, each part with its place.

    Raises:
        CheckpointError, UnsupportedError: as `from_peft`.
    """
    if rename is not None and model is None:
        raise CheckpointError("rename: what it makes of paths is checked in the model; give it too")
    paths = Paths(model, rename) if isinstance(model, nn.Module) else None
    parts: list[tuple[ModuleEntry, Part]] = []
    if paths is not None:
        if method.stacks_experts:
            sites, parts = stacked_experts(reader, sites, paths)
        reader, rest = _moved(reader, paths, rest)
    if method.of_whole_model:
        entries = {"": whole_model_entry(model, reader, method)} if sites else {}
    else:
        entries = entries_of(model, reader, method, sites, shared, paths)
    if paths is not None:
        paths.check_used([*sites, *rest])
    for path, entry in entries.items():
        own = on_its_copy(reader, method, path, rest)
        parts += ((entry, part) for part in _parts(own, method, entry, _plain(sites[path])))
    _refuse_tied_tables(reader, parts, model)
    parts = list(as_one_table(parts, model))
    extras = read_extras(reader, rest, model, {entry.path for entry, _ in parts})
    if method.bias_gain is not None:
        gains = {entry.path: method.bias_gain(sites[path]) for path, entry in entries.items()}
        extras = [(entry, multiplied(entry, part, gains)) for entry, part in extras]
    return [
        (padding_checked(reader, entry, part, model), part)
        for entry, part in (*on_tables(parts, extras, model), *extras)
    ]


def _moved(
    reader: ConfigReader, paths: Paths, rest: Mapping[str, Tensor]
) -> tuple[ConfigReader, dict[str, Tensor]]:
    """Return (the config, with the modules trained whole under the model's names too, the tensors
    by keys as the model has them).

    Raises:
        CheckpointError: two keys mean one tensor.
    """
    keys = {key: _moved_key(paths, key) for key in rest}
    twice = next((new for new, n in Counter(keys.values()).items() if n > 1), None)
    if twice is not None:
        raise CheckpointError(f"{reader.where}: two tensors for {short_repr(twice)}")
    saved = reader.names("modules_to_save")
    today = [
        new.replace(".modules_to_save", "").rpartition(".")[0]
        for key, new in keys.items()
        if new != key and in_one_of(saved, key.rpartition(".")[0])
    ]
    if today:
        reader = ConfigReader({**reader, "modules_to_save": [*saved, *today]}, reader.where)
    return reader, {keys[key]: t for key, t in rest.items()}


def _moved_key(paths: Paths, key: str) -> str:
    """Return a key with its module's path as the model has it. PEFT's wrappers stay where they
    were.
    """
    parent, _, name = key.rpartition(".")
    wrappers = ""
    for wrapper in (WRAPPED, ".token_adapter", ".modules_to_save", ".original_module"):
        if parent.endswith(wrapper):
            parent, wrappers = parent.removesuffix(wrapper), wrapper + wrappers
    return f"{paths.find(parent)}{wrappers}.{name}" if parent else key


def _parts(
    reader: ConfigReader, method: Codec, entry: ModuleEntry, held: Mapping[str, Tensor]
) -> Sequence[Part]:
    """Return one module's parts. Whatever fails on tensors whose shapes make no sense together, the
    error gives their shapes.
    """
    shapes = {name: tuple(t.shape) for name, t in held.items()}
    try:
        if not all(shapes.values()):
            raise ValueError("a number alone is no tensor of a module")
        return method.read(reader, entry, held)
    except LoraLiteError:
        raise
    except (ArithmeticError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{reader.where}: {short_repr(entry.path)}: {shapes} don't make a module of "
            f"{method.peft_type}: {short_repr(str(error))}"
        ) from error


def _is_counter(reader: ConfigReader, key: str, t: Tensor, model: Any) -> bool:
    """Tell whether a tensor is a buffer of whole numbers in a module trained whole."""
    whole = not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)
    if not whole or not in_one_of(reader.names("modules_to_save"), key):
        return False
    modules = model.modules() if isinstance(model, nn.Module) else ()
    buffers = {name for module in modules for name in module._buffers}
    return key.rpartition(".")[2] in (buffers or ("num_batches_tracked",))


def _refuse_tied_tables(
    reader: ConfigReader, parts: Iterable[tuple[ModuleEntry, Part]], model: nn.Module | None
) -> None:
    """Refuse an adapted parameter that is held elsewhere too, because PEFT adapts its
    module alone.
    """
    tables = [entry.path for entry, _ in parts if KINDS[entry.kind].bare]
    if model is not None and tables:
        modules = dict(model.named_modules(remove_duplicate=False))
        for path in tables:
            refuse_tied(reader, modules, path)


def _is_left(key: str, leftovers: Iterable[str]) -> bool:
    """Tell whether a tensor belongs to the state of a training, and not to what the
    training made.
    """
    parts = key.split(".")
    return any(name in parts for name in leftovers)


def _plain(held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors under the names that today's files use."""
    return {
        name.removesuffix(".weight") if name == "lora_magnitude_vector.weight" else name: t
        for name, t in held.items()
    }
