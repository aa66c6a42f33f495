"""DeLoRA: a low-rank update whose directions are normalised and whose strength is learned apart.

    y' = y + [ (lam/r) B Xi A  -  (lam0/r) B0 Xi0 A0 ] (w * x)
    Xi = diag 1 / (|a_i| |b_i|),   w_j = |W[:, j]|
    A (r, d_in) rows a_i, B (d_out, r) columns b_i, lam () strength, w (d_in,) frozen

Paper: Bini, Girrbach and Akata 2025, arXiv 2503.18225. The paper subtracts the start, as
`init="subtract"` does. `init="zero_B"` drops the second term and starts from B = 0, as PEFT does:
exact too, but its first optimizer step moves the weight by about lam / sqrt(r d_in).
Identity at the start: the two terms are equal, and the difference form makes it exact. Needs
|W[:, j]| once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.errors import ConfigError
from ..core.method import MATRICES, Layer, ParamSpec, Variant
from ..core.random import kaiming
from ..core.site import Params, Site
from ..core.update_functions import Factors
from ..kernels import low_rank

_FLOOR = 1e-4
"""Norms below it count as it, as in the released code: a zero column of B divides by no zero."""


@dataclass(frozen=True, kw_only=True)
class DeLoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part in this method), and:

    Args:
        lambda0: starting strength (paper: 15 or so).
        init: "subtract" (paper) or "zero_B" (PEFT and the released code).
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    lambda0: float = 15.0
    init: Literal["subtract", "zero_B"] = "subtract"
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "DeLoRAConfig.dropout")
        if self.lambda0 <= 0:
            raise ConfigError(
                f"DeLoRAConfig.lambda0: expected a positive strength (0 has no gradient), found "
                f"{self.lambda0}"
            )


def param_specs(cfg: DeLoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """Factors, strength and column norms; with "subtract" also their frozen starts."""
    a, b = (site.r, site.d_in), (site.d_out, site.r)
    specs = {
        "lora_A": ParamSpec(a, kaiming),
        "lora_B": ParamSpec(b, "zeros" if cfg.init == "zero_B" else kaiming),
        "lora_lambda": ParamSpec((), dtype=torch.float32),
        "lora_wnorm": ParamSpec((site.d_in,), trainable=False, dtype=torch.float32),
    }
    if cfg.init == "subtract":
        specs["lora_A0"] = ParamSpec(a, kaiming, trainable=False)
        specs["lora_B0"] = ParamSpec(b, kaiming, trainable=False)
        specs["lora_lambda0"] = ParamSpec((), trainable=False, dtype=torch.float32)
    return specs


def init(
    cfg: DeLoRAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """Column norms of W, the starting strength, equal live and frozen factors."""
    strength = torch.tensor(cfg.lambda0, dtype=torch.float64)
    start = {"lora_lambda": strength, "lora_wnorm": weight.norm(dim=0)}
    if cfg.init == "subtract":
        A, B = (kaiming(specs[n].shape, generator(n)) for n in ("lora_A", "lora_B"))
        start |= {"lora_A": A, "lora_B": B, "lora_A0": A, "lora_B0": B, "lora_lambda0": strength}
    return start


def _folded(A: Tensor, B: Tensor, lam: Tensor, core: torch.dtype) -> Tensor:
    """B (lam / r) Xi, (d_out, r)."""
    a = A.to(core).norm(dim=1).clamp_min(_FLOOR)  # (r,)
    b = B.to(core).norm(dim=0).clamp_min(_FLOOR)  # (r,)
    return B.to(core) * (lam.to(core) / (A.shape[0] * a * b))


def _factors(p: Params, core: torch.dtype) -> tuple[Tensor, Tensor]:
    """The update as one factor pair, (k, d_in) and (d_out, k), k = 2r or r."""
    A, B = p["lora_A"], _folded(p["lora_A"], p["lora_B"], p["lora_lambda"], core)
    if "lora_A0" in p:
        B0 = _folded(p["lora_A0"], p["lora_B0"], p["lora_lambda0"], core)
        A, B = low_rank.difference(A.to(core), B, p["lora_A0"].to(core), B0)
    return A * p["lora_wnorm"].to(core), B


def prepare(cfg: DeLoRAConfig, p: Params, site: Site, layer: Layer) -> tuple[Tensor, Tensor]:
    """The update as one factor pair, column norms and strength folded in."""
    A, B = _factors(p, low_rank.core_dtype(p["lora_A"].dtype))
    return A.to(p["lora_A"].dtype), B.to(p["lora_A"].dtype)


def outputs(
    cfg: DeLoRAConfig, p: Params, d: tuple[Tensor, Tensor], x: Tensor, y: Tensor, site: Site
) -> Tensor:
    """y + B~ A~ x."""
    return low_rank.add(y, x, *d)


def weight(
    cfg: DeLoRAConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + B~ A~."""
    return low_rank.add_dense(W, *_factors(p, low_rank.core_dtype(W.dtype))), b


def scale(cfg: DeLoRAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """Both strengths times c."""
    return {name: t * c if name.startswith("lora_lambda") else t for name, t in p.items()}


def low_rank_factors(cfg: DeLoRAConfig, p: Params, site: Site) -> Factors:
    """A~, B~ and 1."""
    return (*_factors(p, low_rank.core_dtype(p["lora_A"].dtype)), 1.0)


VARIANT = Variant(
    name="delora",
    good_for="high learning rates without drifting off",
    config=DeLoRAConfig,
    paper="Bini, Girrbach and Akata 2025, arXiv 2503.18225",
    param_specs=param_specs,
    init=init,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    additive=True,
    scale=scale,
    low_rank_factors=low_rank_factors,
    needs=frozenset({"weight"}),
    sites=(*MATRICES, "embedding"),
)
