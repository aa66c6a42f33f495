"""LoRI: LoRA with a frozen random A, and a B of which only chosen entries are learned.

    y' = y + s (x A^T)(M * B)^T        s = alpha / r
    A (r, d_in) frozen, drawn by the seed;   B (d_out, r);   M lora_mask (d_out, r) of 0 and 1

Adapters of several tasks, each of a seed of its own, lie in nearly orthogonal subspaces then, so
that their sum (`ll.combine_adapters`) disturbs none, and a next task leaves the last one be.
Paper: Zhang et al. 2025, arXiv 2504.07448. There M is the largest tenth of B's entries after a
first training with all of them: `ll.masked_by` makes it. A new adapter's M is 1 everywhere.
Identity at the start: B = 0. Needs only x and y.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.method import MATRICES, Layer, ParamSpec, Variant
from ..core.random import kaiming
from ..core.site import Params, Site
from ..core.update_functions import Factors
from ..kernels import low_rank
from ._pair import scale


@dataclass(frozen=True, kw_only=True)
class LoRIConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "LoRIConfig.dropout")


def param_specs(cfg: LoRIConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_B (d_out, r); frozen lora_A (r, d_in), lora_mask (d_out, r)."""
    return {
        "lora_A": ParamSpec((site.r, site.d_in), kaiming, trainable=False, rank_axis=0),
        "lora_B": ParamSpec((site.d_out, site.r), rank_axis=1),
        "lora_mask": ParamSpec((site.d_out, site.r), "ones", trainable=False, rank_axis=1),
    }


def prepare(cfg: LoRIConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """M * B."""
    return p["lora_mask"] * p["lora_B"]


def outputs(cfg: LoRIConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + s (x A^T)(M * B)^T."""
    return low_rank.add(y, x, p["lora_A"], d, site.scale)


def weight(
    cfg: LoRIConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + s (M * B) A."""
    return low_rank.add_dense(W, p["lora_A"], p["lora_mask"] * p["lora_B"], site.scale), b


def low_rank_factors(cfg: LoRIConfig, p: Params, site: Site) -> Factors:
    """A, M * B and alpha / r."""
    return p["lora_A"], p["lora_mask"] * p["lora_B"], site.scale


VARIANT = Variant(
    name="lori",
    good_for="many tasks merged with little interference",
    config=LoRIConfig,
    paper="Zhang et al. 2025, arXiv 2504.07448",
    param_specs=param_specs,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    additive=True,
    scale=scale,
    low_rank_factors=low_rank_factors,
    batched=True,
    sites=(*MATRICES, "embedding"),
)
