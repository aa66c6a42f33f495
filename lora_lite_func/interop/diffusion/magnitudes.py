"""DoRA's magnitudes of a file: of the weight's outputs (d_out, 1), or of its inputs (1, d_in)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...core.errors import CheckpointError, short_repr
from ...variants import DoRAConfig
from ..assembly import ModuleEntry, Part
from ..whole_change import whole_change
from .factored import LowRank, Tensors

__all__ = ["has_magnitudes", "over_inputs", "with_magnitudes"]


class _Update(Protocol):
    """An update that can be worked out."""

    def dense(self) -> Tensor: ...


def over_inputs(t: Tensor) -> bool:
    """Tell whether magnitudes are of the inputs, as LyCORIS has them with wd_on_out=False."""
    return t.ndim > 1 and t.shape[0] == 1


def has_magnitudes(held: Tensors) -> bool:
    """Tell whether a module of a file has magnitudes."""
    return "magnitude" in held or "dora_scale" in held


def with_magnitudes(
    update: _Update, held: Tensors, entry: ModuleEntry
) -> tuple[Part, Tensor | None]:
    """Return (the part of an update with magnitudes, what a learned bias is multiplied by). A LoRA
    with magnitudes of the outputs is a DoRA. For anything else, the whole change is worked out from
    the weight.

    Raises:
        CheckpointError: there is another number of magnitudes than of features.
    """
    site, W = entry.known("DoRA needs both sizes"), entry.weight("DoRA")
    name = "dora_scale" if "dora_scale" in held else "magnitude"
    t, V = held[name], W + update.dense().to(W)
    if name == "dora_scale" and over_inputs(t) and site.d_out != 1:
        return whole_change(_over_inputs(t, V, entry) - W, entry), None
    if t.numel() != site.d_out:
        raise CheckpointError(
            f"{short_repr(entry.path)}: {name}: expected {site.d_out} entries, found shape "
            f"{tuple(t.shape)}"
        )
    m = t.flatten()
    gain = m.to(W) / V.norm(dim=1)
    if isinstance(update, LowRank):
        leaves = {"lora_A": update.A, "lora_B": update.B, "lora_m": m}
        leaves["lora_wnorm2"] = W.square().sum(1)
        return Part(DoRAConfig, leaves, {}, update.r, update.scale * update.r), gain
    return whole_change(gain[:, None] * V - W, entry), gain


def _over_inputs(t: Tensor, V: Tensor, entry: ModuleEntry) -> Tensor:
    """Return the weight V (d_out, d_in) with the magnitudes t (1, channels, 1, ...) of its inputs,
    as LyCORIS has them with wd_on_out=False. A channel's entries have one.
    """
    if not t.numel() or V.shape[1] % t.numel():
        raise CheckpointError(
            f"{short_repr(entry.path)}: dora_scale: expected one entry for each input channel, "
            f"{V.shape[1]} inputs in all, found shape {tuple(t.shape)}"
        )
    kernel = V.unflatten(1, (t.numel(), -1))
    norm = kernel.square().sum((0, 2)).sqrt()
    return (kernel * (t.flatten().to(V) / norm)[:, None]).flatten(1)
