"""GraLoRA: the weight is cut into a k x k grid, each part with a LoRA of rank r / k.

    W'_jn = W_jn + s B_j[:, n] A_n[j]        s = alpha / (r + hybrid_r)
    A (k, r, d_in / k), B (k, d_out / k, r), [n] the n-th of k groups of the r directions
    hybrid_r > 0 adds  s B~ A~,  A~ (hybrid_r, d_in), B~ (d_out, hybrid_r)

It has as many parameters as one LoRA of rank r. Paper: Jung et al. 2025, arXiv 2505.20355.
Identity at the start: B = 0 (and B~ = 0). Needs only x and y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.errors import ConfigError
from ..core.method import ParamSpec, Variant
from ..core.random import kaiming
from ..core.site import Params, Site
from ..kernels import block_diagonal, low_rank


@dataclass(frozen=True, kw_only=True)
class GraLoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        k: parts per side (paper: 2 up to rank 32, 4 from rank 64); must divide r, d_in and d_out.
        hybrid_r: rank of a LoRA over the whole weight beside the grid.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    k: int = 2
    hybrid_r: int = 0
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "GraLoRAConfig.dropout")
        if self.k < 1 or self.hybrid_r < 0:
            raise ConfigError(
                f"GraLoRAConfig: expected k of at least 1 and hybrid_r of at least 0, found "
                f"{self.k} and {self.hybrid_r}"
            )


def param_specs(cfg: GraLoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (k, r, d_in / k), lora_B (k, d_out / k, r); with hybrid_r also lora_A_whole,
    lora_B_whole.

    Raises:
        UnsupportedError: a width or the rank isn't divisible by k.
    """
    k, r = cfg.k, site.r
    for width, what in ((r, "r"), (site.d_in, "d_in"), (site.d_out, "d_out")):
        block_diagonal.check_divides("GraLoRA", "k", k, width, what)
    specs = {
        "lora_A": ParamSpec((k, r, site.d_in // k), kaiming),
        "lora_B": ParamSpec((k, site.d_out // k, r)),
    }
    if cfg.hybrid_r:
        specs["lora_A_whole"] = ParamSpec((cfg.hybrid_r, site.d_in), kaiming)
        specs["lora_B_whole"] = ParamSpec((site.d_out, cfg.hybrid_r))
    return specs


def outputs(cfg: GraLoRAConfig, p: Params, d: None, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + s (grid x) (+ s B~ A~ x)."""
    (A, B), k = low_rank.alike(p["lora_A"], p["lora_B"]), cfg.k
    parts = low_rank.cast(x, A.dtype).unflatten(-1, (k, -1))  # (..., n, d_in / k)
    h = torch.einsum("...ni,nri->...nr", parts, A).unflatten(-1, (k, -1))  # (..., n, j, r / k)
    # each part of the output hears a group of every part of the input
    h = h.transpose(-3, -2).flatten(-2)  # (..., j, r)
    grid = torch.einsum("...jr,jor->...jo", h, B).flatten(-2)  # (..., d_out)
    y = (y + grid * site.scale).to(y.dtype)
    if not cfg.hybrid_r:
        return y
    return low_rank.add(y, x, p["lora_A_whole"], p["lora_B_whole"], site.scale)


def weight(
    cfg: GraLoRAConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + s grid (+ s B~ A~)."""
    A = p["lora_A"].to(W.dtype).unflatten(1, (cfg.k, -1))  # (n, j, q, d_in / k)
    B = p["lora_B"].to(W.dtype).unflatten(2, (cfg.k, -1))  # (j, d_out / k, n, q)
    grid = torch.einsum("jonq,njqi->joni", B, A).flatten(2, 3).flatten(0, 1)  # (d_out, d_in)
    W = W + grid * site.scale
    if cfg.hybrid_r:
        W = low_rank.add_dense(W, p["lora_A_whole"], p["lora_B_whole"], site.scale)
    return W, b


def scale(cfg: GraLoRAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """B (and B~) times c."""
    return {name: t * c if name.startswith("lora_B") else t for name, t in p.items()}


def scaling(cfg: GraLoRAConfig, site: Site) -> float:
    """alpha / (r + hybrid_r)."""
    return site.alpha / (site.r + cfg.hybrid_r)


VARIANT = Variant(
    name="gralora",
    good_for="large ranks where LoRA saturates",
    config=GraLoRAConfig,
    paper="Jung et al. 2025, arXiv 2505.20355",
    param_specs=param_specs,
    outputs=outputs,
    weight=weight,
    additive=True,
    scale=scale,
    scaling=scaling,
)
