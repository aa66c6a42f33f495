"""One module of a file as parts of adapters, for each place that it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...core.errors import CheckpointError, UnsupportedError, short_repr
from ...core.site import Site
from ...layers.kinds import KINDS
from ...variants import BitFitConfig
from ..assembly import ModuleEntry, Part, common_dtype
from ..peft.modules import adaptable
from .changes import changes, replaced
from .declared import Declared
from .factored import Hadamard, LowRank, Rows, Tensors, rows_of
from .gather import FileModule
from .kronecker import Kronecker
from .magnitudes import has_magnitudes, over_inputs, with_magnitudes
from .multiplied import CONSTRAINT, Gate, Rotation, Sandwich

__all__ = ["module_parts"]

_BY_ROWS = ("up", "up_bias", "magnitude", "dora_scale", "diff", "diff_b", "set_weight")
Placed = tuple[ModuleEntry, Part]
Factored = LowRank | Hadamard | Kronecker
Update = Factored | Gate | Sandwich | Rotation
_KINDS: Mapping[str, tuple[type[Any], tuple[str, ...]]] = {
    "lora": (LowRank, ("down", "up", "mid", "up_bias")),
    "hada": (Hadamard, ("hada",)),
    "lokr": (Kronecker, ("lokr",)),
    "ia3": (Gate, ("gate", "on_input")),
    "glora": (Sandwich, ("a1", "a2", "b1", "b2", "bm")),
    "oft": (Rotation, ("oft_blocks", "rescale")),
}
"""{kind: (its update, what the roles of its tensors begin with)}."""


def module_parts(
    module: FileModule,
    entries: Mapping[str, tuple[Site, Any]],
    declared: Declared,
    model: nn.Module,
) -> Iterator[Placed]:
    """Return the parts of a module of a file.

    Args:
        module: the file's module.
        entries: {path: (site, module)} of the places that it means.
        declared: the file's metadata.
        model: the base.

    Raises:
        CheckpointError: the tensors make no update, or don't fit.
        UnsupportedError: such an update can't adapt a place.
    """
    held = {role: t for role, t in module.held.items() if role != "alpha"}
    common = common_dtype(held.values())
    held = {role: t.to(common or t.dtype) for role, t in held.items()}
    alpha = _alpha(module)
    if alpha is not None and "oft_blocks" in held:
        held[CONSTRAINT] = torch.tensor(alpha)
    if not held:
        raise CheckpointError(
            f"{short_repr(module.name)} has alpha alone and lacks its factors "
            f"(down and up), so the file is incomplete"
        )
    _check_rows(module)
    made = _factored(held, ModuleEntry("", {}, *entries[module.targets[0].path]), module.name)
    for target in module.targets:
        name = target.path if "." not in module.name else module.name
        entry = ModuleEntry(target.path, {}, *entries[target.path], named=name)
        yield from _kept_whole(held, entry, target.rows, model)
        for part in _changed(held, entry, target.rows):
            yield entry, part
        if made is None:
            continue
        own = {role: rows_of(t, target.rows) if role in _BY_ROWS else t for role, t in held.items()}
        said = declared.parts(module.start, own, entry, alpha)
        if said is not None and target.rows and not isinstance(made, LowRank):
            raise CheckpointError(
                f"{short_repr(module.name)} is several layers of the model, "
                f"which isn't read beside a config of PEFT's"
            )
        for part in _scaled(made.share(target.rows), alpha, own, entry) if said is None else said:
            yield entry, part


# ------------------------------------------------------------------------------------------ factors
def _factored(held: Tensors, entry: ModuleEntry, name: str) -> Update | None:
    """Return the update by factors, if there is one.

    Raises:
        CheckpointError: a layer has two of them, or half of one.
    """
    found = [
        kind for kind, (_, starts) in _KINDS.items() if any(r.startswith(starts) for r in held)
    ]
    if len(found) > 1:
        raise CheckpointError(f"{short_repr(name)} has factors of both {' and '.join(found)}")
    if not found:
        if has_magnitudes(held):
            raise CheckpointError(f"{short_repr(name)} has magnitudes (DoRA) and lacks the factors")
        return None
    entry.path = name
    if has_magnitudes(held) and not issubclass(_KINDS[found[0]][0], Factored):
        raise CheckpointError(f"{short_repr(name)} has magnitudes (DoRA) beside {found[0]}")
    update: Update = _KINDS[found[0]][0].of(held, entry)
    return update


def _scaled(update: Update, alpha: float | None, held: Tensors, entry: ModuleEntry) -> list[Part]:
    """Return the parts of an update by factors: with alpha, and DoRA's magnitudes or a learned
    bias.
    """
    if update.r and alpha is not None:
        update.scale = alpha / update.r
    scale, gain = update.scale, None
    if has_magnitudes(held) and isinstance(update, Factored):
        part, gain = with_magnitudes(update, held, entry)
    else:
        part = update.part(entry)
    if "up_bias" not in held:
        return [part]
    shift = held["up_bias"].flatten() * scale
    return [part, Part(BitFitConfig, {"lora_b": shift if gain is None else shift * gain}, order=1)]


def _alpha(module: FileModule) -> float | None:
    t = module.held.get("alpha")
    if t is None:
        return None
    told = f"{short_repr(module.targets[0].path)}: alpha: "
    if t.numel() != 1 or t.is_complex() or t.is_meta:
        raise CheckpointError(
            told + f"expected a number, found shape {tuple(t.shape)} of {t.dtype}"
        )
    value = float(t)
    if not abs(value) < 1e30:
        raise CheckpointError(told + f"expected a finite number, found {short_repr(value)}")
    if value == 0.0 and "oft_blocks" not in module.held:
        raise CheckpointError(
            told + "is 0, which kohya's scripts and LyCORIS take for the rank and others for no "
            "update at all; leave the key out for the first, the module for the second"
        )
    return value


# --------------------------------------------------------------------------------- whole parameters
def _kept_whole(
    held: Tensors, entry: ModuleEntry, rows: Rows, model: nn.Module
) -> Iterator[Placed]:
    """Return the parameters that are kept whole: set_weight, and the diff of what no other method
    adapts.
    """
    for role in ("set_weight", "diff"):
        if role in held and (role == "set_weight" or not _by_update(entry)):
            path = entry.path if KINDS[entry.kind].bare else f"{entry.path}.weight"
            parameter = ModuleEntry(path, {}, *adaptable(model, [path])[path])
            yield parameter, replaced(role, held[role], parameter, rows)


def _changed(held: Tensors, entry: ModuleEntry, rows: Rows) -> list[Part]:
    roles = ("diff", "diff_b") if _by_update(entry) else ("diff_b",)
    return changes({role: held[role] for role in roles if role in held}, entry, rows)


def _by_update(entry: ModuleEntry) -> bool:
    return entry.kind in ("linear", "conv", "norm")


def _check_rows(module: FileModule) -> None:
    """Refuse a fused layer of another size than the layers that it is made of, and one with
    magnitudes of its inputs, which are of them all.
    """
    ends = [end for target in module.targets for _, end in target.rows]
    if not ends:
        return
    expected, held = max(ends), module.held
    if "dora_scale" in held and over_inputs(held["dora_scale"]):
        raise UnsupportedError(
            f"{short_repr(module.name)}: dora_scale of shape {tuple(held['dora_scale'].shape)} "
            f"scales the inputs (LyCORIS' wd_on_out=False) of a layer that is several in the "
            f"model; merge it into the model with the tool that made it"
        )
    for role in _BY_ROWS:
        if (
            role in held
            and held[role].ndim
            and held[role].numel()
            and held[role].shape[0] != expected
        ):
            paths = ", ".join(target.path for target in module.targets)
            raise CheckpointError(
                f"{short_repr(module.name)}: {role}: expected {expected} rows, those of {paths}, "
                f"found shape {tuple(held[role].shape)}"
            )
