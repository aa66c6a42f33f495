"""PSOFT: the weight's principal part is rotated in its own subspace, with a gain on either side.

    W' = W + U S (R~ - I) V^T        R~ = diag(1 + b) R diag(1 + a)
    U (d_out, r), S (r,), V^T lora_Vh (r, d_in) frozen: the r largest singular triplets of W
    R = (I + Q)(I - Q)^-1 (r, r), Q skew of the vector q (r (r - 1) / 2,);   a, b (r,)

Paper: Wu et al. 2025, arXiv 2505.11235. `both_sides` puts sqrt(S) on either side of R~ - I, where
the paper has S on the left. (PEFT's psoft_alpha cancels itself; alpha has no part in this method.)
Identity at the start: q = 0 and a = b = 0, exactly. Needs W once, for the decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability, record
from ..core.errors import ConfigError
from ..core.method import MATRICES, ParamSpec, Variant
from ..core.site import Params, Site
from ..kernels import cayley, low_rank
from ._made_pair import Pair, made_pair


@dataclass(frozen=True, kw_only=True)
class PSOFTConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part in this method), and:

    Args:
        r: how many of the top singular directions are rotated.
        both_sides: whether the singular values' roots stand on either side of the rotation,
            instead of the values on its left.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
        svd_niter: None for the full SVD; a number for the randomised one with that many power
            iterations (4 to 16).
    """

    r: int = 32
    both_sides: bool = False
    dropout: float = 0.0
    svd_niter: int | None = record(None)

    def validate(self) -> None:
        probability(self.dropout, "PSOFTConfig.dropout")
        if self.svd_niter is not None and self.svd_niter < 0:
            raise ConfigError(
                f"PSOFTConfig.svd_niter: expected None or at least 0, found {self.svd_niter}"
            )


def param_specs(cfg: PSOFTConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_q (r (r - 1) / 2,), lora_gain_a, lora_gain_b (r,); frozen lora_U, lora_S,
    lora_Vh.

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "PSOFT")
    return {
        "lora_q": ParamSpec((cayley.pairs(site.r),), dtype=torch.float32),
        "lora_gain_a": ParamSpec((site.r,), dtype=torch.float32),
        "lora_gain_b": ParamSpec((site.r,), dtype=torch.float32),
        "lora_U": ParamSpec((site.d_out, site.r), trainable=False),
        "lora_S": ParamSpec((site.r,), trainable=False, dtype=torch.float32),
        "lora_Vh": ParamSpec((site.r, site.d_in), trainable=False),
    }


def init(
    cfg: PSOFTConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The top r singular triplets."""
    U, S, Vh = low_rank.top_svd(weight, site.r, cfg.svd_niter, generator("lora_U"))
    return {"lora_U": U, "lora_S": S, "lora_Vh": Vh}


def _core(cfg: PSOFTConfig, p: Params, dtype: torch.dtype) -> Tensor:
    """S (R~ - I), (r, r), zero exactly where q, a and b are."""
    q, a, b, S = (p[f"lora_{name}"].to(dtype) for name in ("q", "gain_a", "gain_b", "S"))
    turn = cayley.minus_identity(q, S.shape[-1])  # R - I
    gains = torch.diag_embed(a + b + a * b)
    moved = (1.0 + b).unsqueeze(-1) * turn * (1.0 + a).unsqueeze(-2) + gains
    if not cfg.both_sides:
        return S.unsqueeze(-1) * moved
    root = S.sqrt()
    return root.unsqueeze(-1) * moved * root.unsqueeze(-2)


def _factors(cfg: PSOFTConfig, p: Params, site: Site, dtype: torch.dtype | None) -> Pair:
    """U S (R~ - I) V^T as one factor pair, (r, d_in) and (d_out, r)."""
    dtype = p["lora_U"].dtype if dtype is None else dtype
    U, Vh = p["lora_U"].to(dtype), p["lora_Vh"].to(dtype)
    core = _core(cfg, p, low_rank.core_dtype(dtype)).to(dtype)
    return low_rank.around_core(Vh, core, U)


_PHASES = made_pair(_factors, scaled=False)


def scale(cfg: PSOFTConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """q, a and b times c: R(-q) is R(q)^T."""
    return {
        name: t * c if name in ("lora_q", "lora_gain_a", "lora_gain_b") else t
        for name, t in p.items()
    }


VARIANT = Variant(
    name="psoft",
    good_for="rotations within the weight's main directions",
    config=PSOFTConfig,
    paper="Wu et al. 2025, arXiv 2505.11235",
    param_specs=param_specs,
    init=init,
    prepare=_PHASES.prepare,
    outputs=_PHASES.outputs,
    weight=_PHASES.weight,
    additive=True,
    scale=scale,
    low_rank_factors=_PHASES.low_rank_factors,
    batched=True,
    needs=frozenset({"weight"}),
    sites=(*MATRICES, "embedding"),
)
