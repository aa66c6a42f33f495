"""BD-LoRA: a LoRA with a block-diagonal A, or B, or both, which is MELoRA.

    y' = y + s (x A^T) B^T        s = alpha / r
    A = diag(A_1, ..., A_n), stored (r, d_in / n);   B = diag(B_1, ..., B_m), stored (d_out, r / m)

With a block-diagonal B, a layer whose outputs are shared out over devices needs no exchange beside
the base's, with a block-diagonal A one whose inputs are. With both (n = m) the update is n small
LoRAs of rank r / n on slices, and of rank r together.
Papers: BD-LoRA, arXiv 2510.23346; MELoRA, Ren et al. 2024, arXiv 2402.17263.
Identity at the start: B = 0. Needs only x and y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import ParamSpec, Variant
from ..core.random import kaiming
from ..core.site import Params, Site
from ._made_pair import Pair, made_pair
from ._pair import scale


@dataclass(frozen=True, kw_only=True)
class BDLoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        blocks_A: how many blocks A has; they divide r and d_in.
        blocks_B: how many blocks B has; they divide r and d_out.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    blocks_A: int = 1
    blocks_B: int = 2
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "BDLoRAConfig.dropout")
        for name in ("blocks_A", "blocks_B"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"BDLoRAConfig.{name}: expected at least 1, found {getattr(self, name)}"
                )


def param_specs(cfg: BDLoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (r, d_in / blocks_A), lora_B (d_out, r / blocks_B).

    Raises:
        UnsupportedError: blocks don't divide what they share out.
    """
    for blocks, name, width, what in (
        (cfg.blocks_A, "blocks_A", site.d_in, "d_in"),
        (cfg.blocks_B, "blocks_B", site.d_out, "d_out"),
    ):
        if width % blocks or site.r % blocks:
            raise UnsupportedError(
                f"BD-LoRA shares out {what} and r among blocks, expected both divisible by "
                f"{name}={blocks}, found {what}={width} and r={site.r}"
            )
    return {
        "lora_A": ParamSpec((site.r, site.d_in // cfg.blocks_A), kaiming),
        "lora_B": ParamSpec((site.d_out, site.r // cfg.blocks_B)),
    }


def _diagonal(stored: Tensor, blocks: int) -> Tensor:
    """The matrix (rows, blocks k) whose diagonal blocks are stored (rows, k)."""
    if blocks == 1:
        return stored
    eye = torch.eye(blocks, dtype=stored.dtype, device=stored.device)
    apart = stored.unflatten(-2, (blocks, -1)).unsqueeze(-2)  # (..., blocks, rows / blocks, 1, k)
    return (apart * eye[:, None, :, None]).flatten(-2).flatten(-3, -2)


def _factors(cfg: BDLoRAConfig, p: Params, site: Site, dtype: torch.dtype | None) -> Pair:
    """A (r, d_in) and B (d_out, r) with their zeros. One product of them takes no longer than
    several products of blocks.
    """
    return _diagonal(p["lora_A"], cfg.blocks_A), _diagonal(p["lora_B"], cfg.blocks_B)


_PHASES = made_pair(_factors)


VARIANT = Variant(
    name="bdlora",
    good_for="sharded serving without an exchange",
    config=BDLoRAConfig,
    paper="BD-LoRA 2025, arXiv 2510.23346; MELoRA, Ren et al. 2024, arXiv 2402.17263",
    param_specs=param_specs,
    prepare=_PHASES.prepare,
    outputs=_PHASES.outputs,
    weight=_PHASES.weight,
    additive=True,
    scale=scale,
    low_rank_factors=_PHASES.low_rank_factors,
    batched=True,
)
