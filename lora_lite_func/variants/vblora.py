"""VB-LoRA: both factors are put together of vectors from one bank, which all layers share.

    y' = y + g (x A^T) B^T
    A (r, d_in), B (d_out, r): d_in / v and d_out / v sub-vectors of length v in each direction
    sub-vector = sum over the top k of its h logits of softmax(those k logits)_i V_i
    V (h, v) of all layers;   logits A (r, d_in / v, h), B (d_out / v, r, h);   g = 1, a strength

Paper: Li, Han and Ji 2024, arXiv 2405.15179. There, as here by default, the start is only near the
base's: both factors start at a mixture of small vectors (B = 0 would leave no gradient). With
`exact_start` the update is B A - B0 A0, where B0 A0 is the start; it takes twice the products.
Identity at the start: with `exact_start`, by that difference. Needs only x and y. Gradients reach
the bank and the logits that are among the top k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import ParamSpec, Variant
from ..core.random import normal, uniform
from ..core.site import Params, Site
from ..kernels import low_rank, positions
from ..kernels.indices import check_indices
from ._made_pair import Pair, made_pair

_GROUP = "all"


@dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part in this method), and:

    Args:
        r: rank of the update.
        num_vectors: how many vectors the bank has, h.
        vector_length: their length, v, which divides the sizes of every layer.
        topk: how many of them a sub-vector is mixed of, k.
        exact_start: start at the base's very outputs, by subtracting the start.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    exact_start: bool = False
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "VBLoRAConfig.dropout")
        for name in ("num_vectors", "vector_length", "topk"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"VBLoRAConfig.{name}: expected at least 1, found {getattr(self, name)}"
                )
        if self.topk > self.num_vectors:
            raise ConfigError(
                f"VBLoRAConfig.topk: expected at most num_vectors={self.num_vectors}, found "
                f"{self.topk}"
            )


def param_specs(cfg: VBLoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_logits_A (r, d_in / v, h), lora_logits_B (d_out / v, r, h), and lora_bank
    (h, v) of all sites; frozen lora_gain (). With `exact_start` the start too, frozen: lora_bank0,
    and of each sub-vector's top k lora_index_A0, lora_index_B0 and their logits lora_top_A0,
    lora_top_B0.

    Raises:
        UnsupportedError: vector_length doesn't divide d_in and d_out.
    """
    v, h, k = cfg.vector_length, cfg.num_vectors, cfg.topk
    if site.d_in % v or site.d_out % v:
        raise UnsupportedError(
            f"VB-LoRA cuts the rows and columns of a {site.d_out} x {site.d_in} update into "
            f"vectors, expected a vector_length that divides both, found {v}; one that divides "
            f"{gcd(site.d_in, site.d_out)} fits here"
        )
    sides = {"A": (site.r, site.d_in // v), "B": (site.d_out // v, site.r)}
    wide = torch.float32
    found = {
        "lora_bank": ParamSpec((h, v), uniform(0.02), dtype=wide, group=_GROUP),
        "lora_gain": ParamSpec((), "ones", trainable=False, dtype=wide),
    }
    for side, shape in sides.items():
        found[f"lora_logits_{side}"] = ParamSpec((*shape, h), normal(0.1), dtype=wide)
    if cfg.exact_start:
        found["lora_bank0"] = ParamSpec((h, v), trainable=False, dtype=wide, group=_GROUP)
        for side, shape in sides.items():
            top = (*shape, k)
            found[f"lora_top_{side}0"] = ParamSpec(top, trainable=False, dtype=wide)
            found[f"lora_index_{side}0"] = ParamSpec(
                top, trainable=False, dtype=positions.index_dtype(h)
            )
    return found


def init(
    cfg: VBLoRAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """What the start consists of, where it is kept."""
    if not cfg.exact_start:
        return {}
    bank = uniform(0.02)(specs["lora_bank"].shape, generator("lora_bank"))
    found = {"lora_bank": bank, "lora_bank0": bank}
    for side in "AB":
        name = f"lora_logits_{side}"
        logits = normal(0.1)(specs[name].shape, generator(name))
        found[name] = logits
        found[f"lora_top_{side}0"], found[f"lora_index_{side}0"] = logits.topk(cfg.topk)
    return found


def _mixed(bank: Tensor, logits: Tensor, indices: Tensor) -> Tensor:
    """(..., a, b, v): for each of a x b sub-vectors the mixture of rows of the bank (..., h, v).

    Args:
        bank: with as many leading dimensions as there are, or fewer.
        logits: (..., a, b, k) of the chosen rows.
        indices: (..., a, b, k), which rows.
    """
    lead, (h, v) = indices.shape[:-3], bank.shape[-2:]
    missing = [1] * (len(lead) + 2 - bank.ndim)
    bank = bank.reshape(*bank.shape[:-2], *missing, h, v).expand(*lead, h, v)
    flat = indices.flatten(-3)  # (..., n)
    rows = bank.gather(-2, flat.unsqueeze(-1).expand(*flat.shape, v))  # (..., n, v)
    weights = logits.softmax(-1).flatten(-3)
    return (rows * weights.unsqueeze(-1)).unflatten(-2, indices.shape[-3:]).sum(-2)


def _pair(p: Params, start: str, chosen: Mapping[str, tuple[Tensor, Tensor]]) -> list[Tensor]:
    """A (..., r, d_in) and B (..., d_out, r) of a bank and the (logits, indices) of both sides."""
    A, B = (_mixed(p[f"lora_bank{start}"], *chosen[side]) for side in "AB")
    return [A.flatten(-2), B.mT.flatten(-3, -2)]


def _factors(cfg: VBLoRAConfig, p: Params, site: Site, dtype: torch.dtype | None) -> Pair:
    """The update as one factor pair."""
    tops = {side: p[f"lora_logits_{side}"].topk(cfg.topk, dim=-1) for side in "AB"}
    A, B = _pair(p, "", {side: (top.values, top.indices) for side, top in tops.items()})
    if cfg.exact_start:
        before = {
            side: (
                p[f"lora_top_{side}0"],
                positions.decoded(p[f"lora_index_{side}0"], cfg.num_vectors),
            )
            for side in "AB"
        }
        A, B = low_rank.difference(A, B, *_pair(p, "0", before))
    return A, B * p["lora_gain"][..., None, None]


_PHASES = made_pair(_factors)


def scale(cfg: VBLoRAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """g times c, since the bank is in both factors."""
    return {"lora_gain": p["lora_gain"] * c}


def validate(cfg: VBLoRAConfig, p: Params, site: Site) -> None:
    """Check that the start is mixed of vectors of the bank.

    Raises:
        StructureError: a number is none of a vector.
    """
    for name in ("lora_index_A0", "lora_index_B0") if cfg.exact_start else ():
        check_indices((p[name],), (cfg.num_vectors,), name, once=False)


VARIANT = Variant(
    name="vblora",
    good_for="many adapters from one shared bank",
    config=VBLoRAConfig,
    paper="Li, Han and Ji 2024, arXiv 2405.15179",
    param_specs=param_specs,
    init=init,
    prepare=_PHASES.prepare,
    outputs=_PHASES.outputs,
    weight=_PHASES.weight,
    additive=True,
    validate=validate,
    scale=scale,
    scaling=lambda cfg, site: 1.0,
    low_rank_factors=_PHASES.low_rank_factors,
    batched=True,
)
