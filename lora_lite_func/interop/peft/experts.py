"""A LoRA pair for each expert, as older models have them, in a model that stacks its experts.

Of each expert gate_proj and up_proj (w1, w3), (I, H), are rows of one gate_up_proj (E, 2 I, H), the
gate's first; down_proj (w2) is (E, H, I). Two pairs side by side are one of their ranks together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import CheckpointError, short_repr
from ...variants import LoRAConfig
from ..assembly import ModuleEntry, Part
from ..metadata import ConfigReader
from ..renaming import Paths
from .methods.lora import scale_of
from .methods.lora_starts import rewrites_base
from .modules import adaptable

__all__ = ["stacked_experts"]

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
_ROLES = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
}
_PLACES = {"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1), "down": ("down_proj", 0)}
Sites = Mapping[str, Mapping[str, Tensor]]
Pair = tuple[Tensor, Tensor, float]


def stacked_experts(
    reader: ConfigReader, sites: Sites, paths: Paths
) -> tuple[dict[str, Mapping[str, Tensor]], list[tuple[ModuleEntry, Part]]]:
    """Return (the other sites, the parts of experts that the model has stacked).

    Raises:
        CheckpointError: an expert's tensors aren't a plain pair, or don't fit.
    """
    modules = dict(paths.model.named_modules(remove_duplicate=False))
    pairs: dict[str, dict[tuple[int, int], Pair]] = {}
    others: dict[str, Mapping[str, Tensor]] = {}
    for path, held in sites.items():
        match = _EXPERT.fullmatch(path)
        role = None if match is None or path in modules else _ROLES.get(match[3])
        parent = None if match is None else modules.get(paths.find(match[1]))
        if match is None or role is None or not _is_stack(parent):
            others[path] = held
            continue
        if set(held) != {"lora_A.weight", "lora_B.weight"} or rewrites_base(reader):
            raise CheckpointError(
                f"{reader.where}: {short_repr(path)}: of one expert among others that the model "
                f"stacks a plain LoRA pair is read, found {', '.join(sorted(held))} with "
                f"init_lora_weights={short_repr(reader.get('init_lora_weights'))}"
            )
        name, part = _PLACES[role]
        pair = (held["lora_A.weight"], held["lora_B.weight"], scale_of(reader, path, held))
        place = f"{paths.find(match[1])}.{name}"
        pairs.setdefault(place, {})[int(match[2]), part] = pair
    known = adaptable(paths.model, pairs) if pairs else {}
    dropout = reader.number("lora_dropout", 0.0)
    return others, [
        (ModuleEntry(place, {}, *known[place]), _stacked(place, found, known[place][0], dropout))
        for place, found in pairs.items()
    ]


def _is_stack(module: Any) -> bool:
    """Tell whether a module holds all experts' weights as two tensors, (E, d_out, d_in) each."""
    if not isinstance(module, nn.Module) or getattr(module, "is_transposed", False):
        return False
    tensors = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return all(t is not None and t.ndim == 3 for t in tensors)


def _stacked(place: str, pairs: Mapping[tuple[int, int], Pair], site: Any, dropout: float) -> Part:
    """Return one pair A (E, r, d_in), B (E, d_out, r) of all experts. Those without a pair have
    zeros.
    """
    parts = sorted({part for _, part in pairs})
    halves = 2 if place.endswith("gate_up_proj") else 1
    rows = site.d_out // halves
    ranks = {
        part: max(p[0].shape[0] for (_, at), p in pairs.items() if at == part) for part in parts
    }
    scales = {scale for _, _, scale in pairs.values()}
    common = scales.pop() if len(scales) == 1 else 1.0
    like = next(iter(pairs.values()))[0]
    r = sum(ranks.values())
    A = like.new_zeros(site.num_experts, r, site.d_in)
    B = like.new_zeros(site.num_experts, site.d_out, r)
    for (expert, part), (a, b, scale) in pairs.items():
        first = sum(ranks[other] for other in parts if other < part)
        if (
            expert >= site.num_experts
            or a.ndim != 2
            or b.ndim != 2
            or (a.shape[1], b.shape[0]) != (site.d_in, rows)
            or a.shape[0] != b.shape[1]
        ):
            raise CheckpointError(
                f"{place!r}: expert {expert}: expected factors (r, {site.d_in}) and ({rows}, r) of "
                f"one of {site.num_experts}, found {tuple(a.shape)} and {tuple(b.shape)}"
            )
        more = ranks[part] - a.shape[0]
        A[expert, first : first + ranks[part]] = F.pad(a, (0, 0, 0, more))
        scaled = b if common == scale else b * (scale / common)
        B[expert, part * rows : (part + 1) * rows, first : first + ranks[part]] = F.pad(
            scaled, (0, more)
        )
    return Part(LoRAConfig, {"lora_A": A, "lora_B": B}, {"dropout": dropout}, r, common * r)
