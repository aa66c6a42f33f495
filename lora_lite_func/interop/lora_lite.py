"""from_lora_lite: the .safetensors of lora-lite (github.com/wassname/lora-lite).

    keys      <path>.lora_<name>, the layers' own state
    metadata  "cfg": the config as JSON, flat, with its `variant`
              "base_fp" (some versions): {path: "shape|sum of squares"} of the base as it was left

Its PiSSA and AntiPaSTO take their start out of the base weight. Here the base stays, and the start
is subtracted: worked out anew from the weight (PiSSA) or read from the file (AntiPaSTO). What tells
whether the base is the one that was trained on: the fingerprint, AntiPaSTO's singular triplets,
DeLoRA's norms.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.errors import CheckpointError, ConfigError, nearest, short_repr
from ..core.site import Site
from ..io.file_kinds import reader_hint
from ..io.files import parse_json, path_of, read_safetensors
from ..variants import (
    AntiPaSTOConfig,
    DeLoRAConfig,
    DoRAConfig,
    EVAConfig,
    HRAConfig,
    IA3Config,
    IA3FFConfig,
    LoRAConfig,
    PiSSAConfig,
    ROADConfig,
)
from .assembly import ModuleEntry, Part, assemble
from .lora_lite_methods import (
    Tensors,
    read_antipasto,
    read_delora,
    read_dora,
    read_pissa,
    read_plain,
)
from .metadata import ConfigReader
from .peft.modules import adaptable

__all__ = ["from_lora_lite"]

_SHARED = (
    "variant",
    "r",
    "alpha",
    "dtype",
    "dropout",
    "target_roles",
    "target_names",
    "exclude_names",
    "layers",
    "variant_kwargs",
)
_PICKLES = (".pt", ".pth", ".bin")
_OLD = (
    "old = torch.load(path, weights_only=True); safetensors.torch.save_file(old['state'], "
    "'adapter.safetensors', {'cfg': json.dumps(old['cfg']), "
    "'base_fp': json.dumps(old.get('base_fp', {}))}) makes one"
)


class _Way(NamedTuple):
    """How one variant is read.

    Attributes:
        config: the class of our config.
        fields: {its field: our field}.
        read: (place, tensors, r, scale, fingerprint) -> the leaves besides the renamed ones.
        renamed: {its tensor: ours}, where the names differ.
        fixed: settings of ours that its maths amounts to, unless its fields say otherwise.
    """

    config: Any
    fields: Mapping[str, str]
    read: Callable[[ModuleEntry, Tensors, int, float, float | None], dict[str, Tensor]]
    renamed: Mapping[str, str] = {}
    fixed: Mapping[str, Any] = {}


def from_lora_lite(path: str | os.PathLike[str], model: nn.Module | None = None) -> Adapter:
    """Read an adapter that lora-lite saved: `params = ll.from_lora_lite("adapter.safetensors",
    model)`.

    Args:
        path: its .safetensors file.
        model: the base as it was before lora-lite touched it. LoRA, EVA, DeLoRA and AntiPaSTO can
            do without one. Where it is given, what the file tells of the base is compared with it.

    Raises:
        CheckpointError: the file isn't lora-lite's, has an unknown variant or field, lacks tensors
            or has some of the wrong shape, names a path that the model lacks, or was made for
            another base.
    """
    where = path_of(path, "from_lora_lite")
    if where.endswith(_PICKLES):
        raise CheckpointError(
            f"{where}: expected .safetensors; earlier versions of lora-lite wrote .pt: {_OLD}"
        )
    tensors, metadata = read_safetensors(path)
    way, reader = _config_of(where, tensors, metadata)
    prints = parse_json(metadata.get("base_fp", "{}"), f"{where}: its 'base_fp' metadata")
    r, alpha = reader.whole("r", 8), reader.number("alpha", 16)
    try:
        parts = []
        for entry, held in _places(where, tensors, model):
            print_ = _fingerprint(entry.path, prints, where)
            leaves = {way.renamed.get(n, n): t for n, t in held.items()} | way.read(
                entry, held, r, alpha / r, print_
            )
            fields = {
                ours: reader[theirs]
                for theirs, ours in way.fields.items()
                if theirs in reader and ours
            }
            parts.append((entry, Part(way.config, leaves, {**way.fixed, **fields}, r, alpha)))
        found = assemble(parts)
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: {short_repr(str(error))}") from None
    assert isinstance(found, Adapter)
    return found


def _config_of(
    where: str, tensors: Tensors, metadata: Mapping[str, str]
) -> tuple[_Way, ConfigReader]:
    """The file's variant, and its settings with those of the variant among them.

    Raises:
        CheckpointError: not such a file, another variant or field.
    """
    if "cfg" not in metadata:
        raise CheckpointError(
            f"{where}: no 'cfg' entry in its metadata, so it isn't a file of lora-lite"
            f"{reader_hint(tensors, metadata)}"
        )
    said = ConfigReader(parse_json(metadata["cfg"], f"{where}: its 'cfg' metadata"), where)
    name = said.text("variant")
    if name not in _WAYS:
        raise CheckpointError(
            f"{where}: variant {short_repr(name)} isn't read here; {nearest(name, _WAYS, first=20)}"
        )
    more = said.get("variant_kwargs") or {}
    if not isinstance(more, Mapping):
        raise said.refuse("variant_kwargs", "an object")
    fields = {k: v for k, v in said.items() if k not in _SHARED} | dict(more)
    fields |= {"r": said.get("r", 8), "alpha": said.get("alpha", 16)}
    reader = ConfigReader(fields, where)
    reader.check(["r", "alpha", *_WAYS[name].fields], ())
    return _WAYS[name], reader


def _places(
    where: str, tensors: Tensors, model: Any
) -> list[tuple[ModuleEntry, dict[str, Tensor]]]:
    sites: dict[str, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        path, _, name = key.rpartition(".")
        if not name.startswith("lora_"):
            raise CheckpointError(f"{where}: unexpected tensor {short_repr(key)}")
        sites.setdefault(path, {})[name] = t
    if not sites:
        raise CheckpointError(f"{where}: holds no tensors")
    if model is not None:
        known = adaptable(model, sites)
        return [(ModuleEntry(path, {}, *known[path]), held) for path, held in sites.items()]
    return [(ModuleEntry(path, {}, _sizes(path, held)), held) for path, held in sites.items()]


def _sizes(path: str, held: Tensors) -> Site | None:
    for a, b in (("lora_A", "lora_B"), ("lora_Vh", "lora_U")):
        if a in held and b in held and held[a].ndim == held[b].ndim == 2:
            return Site(path, held[a].shape[1], held[b].shape[0])
    return None


def _fingerprint(path: str, prints: Any, where: str) -> float | None:
    """Return the sum of squares of the base weight as lora-lite left it."""
    if not isinstance(prints, Mapping) or not isinstance(prints.get(path, ""), str):
        raise CheckpointError(f"{where}: base_fp: expected an object of paths and fingerprints")
    text = prints.get(path)
    try:
        return None if text is None else float(text.rpartition("|")[2])
    except ValueError:
        raise CheckpointError(f"{where}: base_fp: {short_repr(text)} isn't a fingerprint") from None


# ------------------------------------------------------------------------------------- the variants


_WAYS: Mapping[str, _Way] = {
    "lora": _Way(LoRAConfig, {}, read_plain),
    "eva": _Way(EVAConfig, {}, read_plain),
    "dora": _Way(DoRAConfig, {}, read_dora, fixed={"detach_norm": True}),
    "pissa": _Way(PiSSAConfig, {}, read_pissa),
    "delora": _Way(DeLoRAConfig, {"lambda0": ""}, read_delora, fixed={"init": "zero_B"}),
    "ia3": _Way(IA3Config, {}, read_plain),
    "ia3_ff": _Way(IA3FFConfig, {}, read_plain),
    "hra": _Way(HRAConfig, {}, read_plain),
    "road": _Way(ROADConfig, {"road_variant": "mode", "group_size": "group_size"}, read_plain),
    "antipasto": _Way(
        AntiPaSTOConfig,
        {"block_size": "block_size", "rotate_basis": "basis", "max_rotation_angle": "max_angle"},
        read_antipasto,
        renamed={"lora_rot_T": "lora_rot"},
        fixed={"max_angle": 0.5, "half_angles": True},
    ),
}
