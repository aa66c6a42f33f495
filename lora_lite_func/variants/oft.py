"""OFT: the layer's input goes through a block-diagonal rotation, block by block a Cayley map.

    x' = x R,   W' = W R^T,   R = diag(R_1 ... R_n)        n b = d_in
    R_i = (I + Q_i)(I - Q_i)^-1                            Q_i (b, b) skew
    x' = x + x E,   E_i = R_i - I = 2 (I - Q_i)^-1 Q_i

Papers: Qiu et al. 2023, arXiv 2306.07280; OFTv2 (input side, Neumann series): Qiu et al. 2025,
arXiv 2506.19847. `cayley="neumann"` is the series of OFTv2, I + 2Q + 2Q^2 + 2Q^3 + Q^4, of the same
sense of rotation. (PEFT's exact branch is the inverse rotation of its Neumann branch: negate q of a
checkpoint trained with it.)
COFT keeps the rotation near the identity: apply `ll.project` after each optimizer step.
Identity at the start: Q = 0, so E is exactly zero. Needs only x. r and alpha have no part in this
method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability, record
from ..core.errors import ConfigError
from ..core.method import Layer, ParamSpec, Variant
from ..core.site import Params, Site
from ..core.update_functions import Forms, Work
from ..kernels import block_diagonal, cayley, low_rank


@dataclass(frozen=True, kw_only=True)
class OFTConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r and alpha have no part in this method), and:

    Args:
        block_size: features per block; must divide d_in.
        cayley: "exact" (orthogonal), or "neumann" (PEFT's series of five terms; orthogonal only
            while Q is small).
        block_share: one rotation for all blocks.
        coft_eps: bound on the length of Q over all blocks, which `ll.project` enforces after a step
            (COFT).
        block_dropout: probability that a block isn't rotated, drawn in each call in training mode
            only.
    """

    block_size: int = 32
    cayley: cayley.Kind = "exact"
    block_share: bool = False
    coft_eps: float = record(6e-5)
    block_dropout: float = 0.0

    def validate(self) -> None:
        if self.block_size < 2:
            raise ConfigError(
                f"OFTConfig.block_size: a rotation needs two features, expected at least 2, "
                f"found {self.block_size}"
            )
        probability(self.block_dropout, "OFTConfig.block_dropout")
        if self.coft_eps <= 0:
            raise ConfigError(
                f"OFTConfig.coft_eps: expected a positive bound, found {self.coft_eps}"
            )


def param_specs(cfg: OFTConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_oft_q (n, b (b - 1) / 2), strict upper triangles; n = 1 where the blocks share.

    Raises:
        UnsupportedError: d_in isn't divisible by block_size.
    """
    block_diagonal.check_divides("OFT", "block_size", cfg.block_size, site.d_in, "d_in")
    n = 1 if cfg.block_share else site.d_in // cfg.block_size
    return {"lora_oft_q": ParamSpec((n, cayley.pairs(cfg.block_size)), dtype=torch.float32)}


def prepare(cfg: OFTConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """E, (n, b, b), or as fewer and larger blocks."""
    E = cayley.minus_identity(p["lora_oft_q"], cfg.block_size, cfg.cayley)
    if cfg.block_dropout and layer.training:
        blocks = site.d_in // cfg.block_size  # so a shared block is dropped in some places
        kept = torch.rand(blocks, 1, 1, device=E.device) >= cfg.block_dropout
        E = E * kept.to(E.dtype)
    return block_diagonal.widened(E)


def inputs(cfg: OFTConfig, p: Params, d: Tensor, x: Tensor, site: Site) -> Tensor:
    """x + x E."""
    return block_diagonal.plus_product(x, d)


def weight(
    cfg: OFTConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W R^T."""
    E = cayley.minus_identity(
        p["lora_oft_q"].to(low_rank.core_dtype(W.dtype)), cfg.block_size, cfg.cayley
    )
    return block_diagonal.plus_product(W, block_diagonal.widened(E).mT), b


def dense(cfg: OFTConfig, site: Site, tokens: int) -> bool | Forms:
    """The same turn for each row of x and of W."""
    if cfg.block_dropout:
        return False
    row = Work(cfg.block_size * site.d_in, passes=3 * site.d_in)
    return Forms(row, Work(row.multiply_adds * site.d_out, row.passes * site.d_out))


def scale(cfg: OFTConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """Q times c; at -1 the inverse rotation."""
    return {"lora_oft_q": p["lora_oft_q"] * c}


def project(cfg: OFTConfig, p: Params) -> dict[str, Tensor]:
    """COFT's constraint as a pure function: each Q_i shortened to a Frobenius norm of at most
    coft_eps / sqrt(n).
    """
    q = p["lora_oft_q"]  # (n, b (b - 1) / 2)
    bound = cfg.coft_eps / q.shape[-2] ** 0.5
    square = 2.0 * q.square().sum(-1, keepdim=True)  # each entry stands in Q twice
    norm = square.clamp_min(bound**2).sqrt()
    return {**p, "lora_oft_q": q * (bound / norm)}


VARIANT = Variant(
    name="oft",
    good_for="keeping angles between outputs, image models",
    config=OFTConfig,
    paper="Qiu et al. 2023, arXiv 2306.07280; Qiu et al. 2025, arXiv 2506.19847",
    param_specs=param_specs,
    prepare=prepare,
    inputs=inputs,
    weight=weight,
    dense=dense,
    scale=scale,
    project=project,
)
