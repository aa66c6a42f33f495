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

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.errors import CheckpointError, ConfigError, nearest, short_repr
from ..core.site import Site
from ..io.file_kinds import reader_hint
from ..io.files import parse_json, read_safetensors
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
# Fingerprints are sums of squares of weights that may have been rounded to 16 bits.
_CLOSE = 2e-3
Held = Mapping[str, Tensor]


class _Way(NamedTuple):
    """How one variant is read.

    Attributes:
        config: the class of our config.
        fields: {its field: our field}.
        read: (place, tensors, r, scale, fingerprint) -> the leaves beside the renamed ones.
        renamed: {its tensor: ours}, where the names differ.
        fixed: settings of ours that its maths amounts to, unless its fields say otherwise.
    """

    config: Any
    fields: Mapping[str, str]
    read: Callable[[ModuleEntry, Held, int, float, float | None], dict[str, Tensor]]
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
    where = os.fsdecode(path)
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


def _config_of(where: str, tensors: Held, metadata: Mapping[str, str]) -> tuple[_Way, ConfigReader]:
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


def _places(where: str, tensors: Held, model: Any) -> list[tuple[ModuleEntry, dict[str, Tensor]]]:
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


def _sizes(path: str, held: Held) -> Site | None:
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


def _matches(weight: Tensor, expected: float | None, whole: Tensor | None = None) -> bool:
    """Tell whether a weight has the fingerprint. What is left of a `whole` weight is only as exact
    as the rounding of that weight.
    """
    size = 0.0 if whole is None else 1e-4 * float(whole.square().sum())
    return (
        expected is None
        or abs(float(weight.square().sum()) - expected) <= _CLOSE * abs(expected) + size
    )


# ------------------------------------------------------------------------------------- the variants
def _plain(
    entry: ModuleEntry, held: Held, r: int, scale: float, expected: float | None
) -> dict[str, Tensor]:
    """Return nothing beside what the file holds. The base is compared if it was given."""
    if (
        entry.module is not None
        and expected is not None
        and not _matches(entry.weight("lora-lite"), expected)
    ):
        raise CheckpointError(
            f"{short_repr(entry.path)}: the file was made on another base (its fingerprint of "
            f"the weight differs)"
        )
    return {}


def _dora(
    entry: ModuleEntry, held: Held, r: int, scale: float, expected: float | None
) -> dict[str, Tensor]:
    """Return the squared norms of the base weight's rows. lora-lite computes them again in each
    call, and ours are kept.
    """
    _plain(entry, held, r, scale, expected)
    return {"lora_wnorm2": entry.weight("DoRA").square().sum(1)}


def _delora(
    entry: ModuleEntry, held: Held, r: int, scale: float, expected: float | None
) -> dict[str, Tensor]:
    """Refuse another base than the file's, told by the column norms that the file holds."""
    _plain(entry, held, r, scale, expected)
    norms = held.get("lora_wnorm")
    if entry.module is not None and norms is not None:
        _refuse_apart(entry, norms, entry.weight("DeLoRA").norm(dim=0), "norms of its columns")
    return {}


def _refuse_apart(entry: ModuleEntry, held: Tensor, own: Tensor, what: str) -> None:
    """Refuse a base that isn't the one that a file's frozen tensor was made of.

    Raises:
        CheckpointError: the two are further apart than rounding makes them.
    """
    if held.shape != own.shape:
        return  # the code that fits the tensors refuses a wrong shape
    allowed = 1e-3 + 4.0 * torch.finfo(held.dtype).eps
    if float((held.to(own) - own).abs().max()) > allowed * float(own.abs().max()):
        raise CheckpointError(
            f"{short_repr(entry.path)}: the file was made on another base (the {what} differ); "
            f"give the base as it was before lora-lite touched it"
        )


def _pissa(
    entry: ModuleEntry, held: Held, r: int, scale: float, expected: float | None
) -> dict[str, Tensor]:
    """Return the start that was taken out of W. It is the top singular triplets, divided by the
    scale or (in lora-lite's earlier versions) not, and the fingerprint tells which.

    The start is rounded to the dtype of the file, as it was when it was taken out.
    """
    W, dtype = entry.weight("PiSSA"), held["lora_A"].dtype
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    for over in (scale, 1.0):
        if over <= 0 or r > S.shape[0]:
            continue
        root = (S[:r] / over).sqrt()
        A, B = (root[:, None] * Vh[:r]).to(dtype), (U[:, :r] * root).to(dtype)
        if _matches(W - scale * (B.to(W) @ A.to(W)), expected, W):
            return {"lora_A0": A, "lora_B0": B}
    raise CheckpointError(
        f"{short_repr(entry.path)}: the file was made on another base (its fingerprint of what "
        f"PiSSA left differs)"
    )


def _antipasto(
    entry: ModuleEntry, held: Held, r: int, scale: float, expected: float | None
) -> dict[str, Tensor]:
    """Check that the file's singular triplets are of the base, U_i^T W v_i = S_i. `half_angles`
    says how the variant uses T.
    """
    if entry.module is not None:
        _refuse_triplets(entry, held)
    if entry.module is not None and expected is not None:
        W = entry.weight("AntiPaSTO")
        start = (held["lora_U"] * held["lora_S"]).to(W) @ held["lora_Vh"].to(W)
        if not _matches(W - start, expected, W):
            raise CheckpointError(
                f"{short_repr(entry.path)}: the file was made on another base (its fingerprint "
                f"differs)"
            )
    return {}


def _refuse_triplets(entry: ModuleEntry, held: Held) -> None:
    U, S, Vh = (held.get(f"lora_{name}") for name in ("U", "S", "Vh"))
    W = entry.weight("AntiPaSTO")
    if U is None or S is None or Vh is None or U.shape[:1] + Vh.shape[-1:] != W.shape:
        return  # the code that fits the tensors refuses a wrong shape
    own = ((U.to(W).mT @ W) * Vh.to(W)).sum(1)
    _refuse_apart(entry, own.to(S.dtype), S.to(W), "singular values")


_WAYS: Mapping[str, _Way] = {
    "lora": _Way(LoRAConfig, {}, _plain),
    "eva": _Way(EVAConfig, {}, _plain),
    "dora": _Way(DoRAConfig, {}, _dora, fixed={"detach_norm": True}),
    "pissa": _Way(PiSSAConfig, {}, _pissa),
    "delora": _Way(DeLoRAConfig, {"lambda0": ""}, _delora, fixed={"init": "zero_B"}),
    "ia3": _Way(IA3Config, {}, _plain),
    "ia3_ff": _Way(IA3FFConfig, {}, _plain),
    "hra": _Way(HRAConfig, {}, _plain),
    "road": _Way(ROADConfig, {"road_variant": "mode", "group_size": "group_size"}, _plain),
    "antipasto": _Way(
        AntiPaSTOConfig,
        {"block_size": "block_size", "rotate_basis": "basis", "max_rotation_angle": "max_angle"},
        _antipasto,
        renamed={"lora_rot_T": "lora_rot"},
        fixed={"max_angle": 0.5, "half_angles": True},
    ),
}
