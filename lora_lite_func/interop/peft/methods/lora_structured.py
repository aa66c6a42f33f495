"""LoRA files of pairs with a structure: block-diagonal, on sums of inputs, or with a frozen B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, short_repr
from ....variants import BDLoRAConfig, MiCAConfig, QALoRAConfig
from ...assembly import ModelNeededError, ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Written
from ..keys import attention

__all__ = ["keep_structure", "structured_part"]


def structured_part(
    reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor], dropout: float
) -> Part | None:
    """Return the part of a pair that isn't whole, of alpha 1; None for a plain pair. Which modules
    have such a pair is told by its shape, since PEFT leaves it plain on some.

    Raises:
        CheckpointError: the pair fits neither the config nor the layer, or has magnitudes.
        ModelNeededError: no model was given.
    """
    blocks, groups = bool(reader.get("use_bdlora")), reader.flag("use_qalora")
    if not (blocks or groups) or "lora_A.weight" not in held:
        return None
    if entry.module is None or entry.site is None:
        raise ModelNeededError(
            f"{short_repr(entry.path)}: whether its factors are whole is told by the layer's "
            f"sizes; give the base model too"
        )
    A, B, site = held["lora_A.weight"], held["lora_B.weight"], entry.site
    if A.shape[1] == site.d_in and A.shape[0] == B.shape[1]:
        return None
    if reader.flag("use_dora"):
        raise CheckpointError(
            f"{reader.where}: use_dora with use_{'bdlora' if blocks else 'qalora'} isn't read"
        )
    r, fields = A.shape[0], {"dropout": dropout}
    if groups:
        size = reader.whole("qalora_group_size", 16)
        # PEFT multiplies the groups' means by their number; ours are sums
        leaves = {"lora_A": A * (A.shape[1] / size), "lora_B": B}
        return Part(QALoRAConfig, leaves, fields | {"group_size": size}, r)
    fields |= {"blocks_A": site.d_in // A.shape[1], "blocks_B": r // B.shape[1]}
    return Part(BDLoRAConfig, {"lora_A": A, "lora_B": B}, fields, r)


def keep_structure(low: Sequence[Adapter], made: Written, modules: Mapping[str, Any]) -> None:
    """Write what PEFT knows of these adapters beyond a plain pair: that B is frozen (MiCA), or that
    a factor is block-diagonal, where each layer's last name tells which.
    """
    sites = [site for a in low for site in a.sites.values()]
    if any(attention(modules, site.path) is not None for site in sites):
        return
    kinds = {site.kind for site in sites}
    if all(isinstance(a.config, MiCAConfig) for a in low) and kinds <= {"linear", "embedding"}:
        made.fields["init_lora_weights"] = "mica"
    blocks = _blocks(low)
    straight = kinds == {"linear"} and not any(site.transposed for site in sites)
    if blocks and straight and not made.fields["lora_bias"]:
        made.fields["use_bdlora"] = blocks
        for a in low:
            for path, held in a.items():
                made.tensors[path] = {f"lora_{n}.weight": held[f"lora_{n}"] for n in "AB"}


def _blocks(adapters: Sequence[Adapter]) -> dict[str, Any] | None:
    """Return the settings of these adapters' blocks. It is None where PEFT has none such: both
    factors are block-diagonal, numbers of blocks differ, or names don't tell the layers apart.
    """
    sides: dict[str, set[str]] = {"A": set(), "B": set()}
    counts = set()
    for a in adapters:
        cfg = a.config
        if not isinstance(cfg, BDLoRAConfig) or (cfg.blocks_A > 1) == (cfg.blocks_B > 1):
            return None
        counts.add(max(cfg.blocks_A, cfg.blocks_B))
        sides["A" if cfg.blocks_A > 1 else "B"] |= {path.rpartition(".")[2] for path in a}
    # PEFT looks for these words anywhere in a layer's last name
    mixed = any(one in other or other in one for one in sides["A"] for other in sides["B"])
    if mixed or len(counts) != 1:
        return None
    fields = {f"target_modules_bd_{side.lower()}": sorted(names) for side, names in sides.items()}
    return fields | {"nblocks": counts.pop(), "match_strict": True}
