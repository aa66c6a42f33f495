"""One module of a file as parts of adapters, for each place that it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ...core.errors import CheckpointError, UnsupportedError, short_repr
from ...core.site import Site
from ...layers.kinds import KINDS
from ...variants import BitFitConfig, DoRAConfig
from ..assembly import ModuleEntry, Part, common_dtype
from ..peft.modules import adaptable
from .changes import changes, replaced
from .declared import Declared
from .factored import Hadamard, Held, LowRank, Rows, rows_of
from .gather import FileModule
from .kronecker import Kronecker, whole_change

__all__ = ["module_parts"]

_BY_ROWS = ("up", "up_bias", "magnitude", "dora_scale", "diff", "diff_b", "set_weight")
Placed = tuple[ModuleEntry, Part]
Factored = LowRank | Hadamard | Kronecker


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
    held = {role: t.to(common) for role, t in held.items()}
    alpha = _alpha(module)
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
        for part in _scaled(made, alpha, own, entry, target.rows) if said is None else said:
            yield entry, part


# ------------------------------------------------------------------------------------------ factors
def _factored(held: Held, entry: ModuleEntry, name: str) -> Factored | None:
    """Return the update by factors, if there is one.

    Raises:
        CheckpointError: a layer has two of them, or half of one.
    """
    kinds = {"lora": ("down", "up", "mid", "up_bias"), "hada": ("hada",), "lokr": ("lokr",)}
    found = [kind for kind, starts in kinds.items() if any(r.startswith(starts) for r in held)]
    if len(found) > 1:
        raise CheckpointError(f"{short_repr(name)} has factors of both {' and '.join(found)}")
    if not found:
        if "magnitude" in held or "dora_scale" in held:
            raise CheckpointError(f"{short_repr(name)} has magnitudes (DoRA) and lacks the factors")
        return None
    entry.path = name
    made = {"lora": LowRank, "hada": Hadamard, "lokr": Kronecker}[found[0]]
    update: Factored = made.of(held, entry)  # type: ignore[attr-defined]
    return update


def _scaled(
    made: Factored, alpha: float | None, held: Held, entry: ModuleEntry, rows: Rows
) -> list[Part]:
    """Return the parts of an update by factors: with alpha, and DoRA's magnitudes or a learned
    bias.
    """
    update = made.share(rows)
    if made.r and alpha is not None:
        update.scale = alpha / made.r
    scale, gain = update.scale, None
    if "magnitude" in held or "dora_scale" in held:
        part, gain = _dora(update, held, entry)
    else:
        part = update.part(entry)
    if "up_bias" not in held:
        return [part]
    shift = held["up_bias"].flatten() * scale
    return [part, Part(BitFitConfig, {"lora_b": shift if gain is None else shift * gain}, order=1)]


def _dora(update: Factored, held: Held, entry: ModuleEntry) -> tuple[Part, Tensor]:
    """Return (the part with magnitudes of the weight's rows, what a learned bias is multiplied by).
    A LoRA with magnitudes is a DoRA. For another update, the whole change is worked out from the
    weight.
    """
    site, W = entry.known("DoRA needs both sizes"), entry.weight("DoRA")
    name = "dora_scale" if "dora_scale" in held else "magnitude"
    t = held[name]
    if name == "dora_scale" and t.ndim > 1 and t.shape[0] == 1 != site.d_out:
        raise UnsupportedError(
            f"{short_repr(entry.path)}: dora_scale of shape {tuple(t.shape)} scales the weight's "
            f"inputs (LyCORIS' wd_on_out=False), here DoRA scales its outputs; merge it into the "
            f"model with the tool that made it"
        )
    if t.numel() != site.d_out:
        raise CheckpointError(
            f"{short_repr(entry.path)}: {name}: expected {site.d_out} entries, found shape "
            f"{tuple(t.shape)}"
        )
    m, V = t.flatten(), W + update.dense().to(W)
    gain = m.to(W) / V.norm(dim=1)
    if isinstance(update, LowRank):
        leaves = {"lora_A": update.A, "lora_B": update.B, "lora_m": m}
        leaves["lora_wnorm2"] = W.square().sum(1)
        return Part(DoRAConfig, leaves, {}, update.r, update.scale * update.r), gain
    return whole_change(gain[:, None] * V - W, entry), gain


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
    if value == 0.0:
        raise CheckpointError(
            told + "is 0, which kohya's scripts and LyCORIS take for the rank and others for no "
            "update at all; leave the key out for the first, the module for the second"
        )
    return value


# --------------------------------------------------------------------------------- whole parameters
def _kept_whole(held: Held, entry: ModuleEntry, rows: Rows, model: nn.Module) -> Iterator[Placed]:
    """Return the parameters that are kept whole: set_weight, and the diff of what no other method
    adapts.
    """
    for role in ("set_weight", "diff"):
        if role in held and (role == "set_weight" or not _by_update(entry)):
            path = entry.path if KINDS[entry.kind].bare else f"{entry.path}.weight"
            parameter = ModuleEntry(path, {}, *adaptable(model, [path])[path])
            yield parameter, replaced(role, held[role], parameter, rows)


def _changed(held: Held, entry: ModuleEntry, rows: Rows) -> list[Part]:
    roles = ("diff", "diff_b") if _by_update(entry) else ("diff_b",)
    return changes({role: held[role] for role in roles if role in held}, entry, rows)


def _by_update(entry: ModuleEntry) -> bool:
    return entry.kind in ("linear", "conv", "norm")


def _check_rows(module: FileModule) -> None:
    """Refuse a fused layer of another size than the layers that it is made of."""
    ends = [end for target in module.targets for _, end in target.rows]
    if not ends:
        return
    expected, held = max(ends), module.held
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
