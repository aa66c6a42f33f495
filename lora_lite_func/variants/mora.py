"""MoRA: a square matrix between a fixed folding of the input and a fixed unfolding of the output.

    y' = y + unfold(M fold(x))
    M (k, k),  k = floor(sqrt((d_in + d_out) r) + 1/2): as many parameters as a LoRA, of rank k

x is cut into parts of k, the last filled up with x's head.
"sharing": fold(x) is the sum of the parts, and unfold repeats k outputs until there are d_out.
"rope": part i is turned by rotary angles i 10000^(-2j/k) (k even), M maps each, and the results,
one behind the other, are cut or repeated to d_out.
Paper: Jiang et al. 2024, arXiv 2405.12130 (types 1 and 6 there). alpha has no part in this method.
Identity at the start: M = 0. Needs only x and y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.method import ParamSpec, Variant
from ..core.site import Params, Site
from ..core.update_functions import Forms, Work
from ..kernels import low_rank


@dataclass(frozen=True, kw_only=True)
class MoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r sets the number of parameters, as many as a LoRA's;
    alpha has no part in this method), and:

    Args:
        mode: "rope" (paper's type 6) or "sharing" (type 1), which costs less.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    mode: Literal["rope", "sharing"] = "rope"
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "MoRAConfig.dropout")


def _side(cfg: MoRAConfig, site: Site) -> int:
    """k."""
    k = math.floor(math.sqrt((site.d_in + site.d_out) * site.r) + 0.5)
    return k if cfg.mode == "sharing" else max(k - k % 2, 2)


def param_specs(cfg: MoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_M (k, k)."""
    k = _side(cfg, site)
    return {"lora_M": ParamSpec((k, k))}


def _wrapped(t: Tensor, size: int) -> Tensor:
    """The last axis cut to this size, or filled up with its own head."""
    d = t.shape[-1]
    if size <= d:
        return t[..., :size]
    return torch.cat([t] * (size // d) + [t[..., : size % d]], dim=-1)


def _turned(parts: Tensor) -> Tensor:
    """Part i of (..., parts, k) by its rotary angles: halves of k are paired."""
    n, k = parts.shape[-2:]
    dtype = low_rank.core_dtype(parts.dtype)
    # angles are made where x is, since the caller's defaults must have no part in them
    rates = 10000.0 ** (-torch.arange(0, k, 2, dtype=dtype, device=parts.device) / k)
    angles = torch.arange(n, dtype=dtype, device=parts.device)[:, None] * rates  # (n, k / 2)
    cosine, sine = angles.cos().to(parts.dtype), angles.sin().to(parts.dtype)
    first, second = parts.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def _parts(cfg: MoRAConfig, x: Tensor, k: int) -> Tensor:
    """x (..., d_in) in parts, folded or turned: (..., k) or (..., n, k)."""
    n = -(-x.shape[-1] // k)
    parts = _wrapped(x, n * k).unflatten(-1, (n, k))
    return parts.sum(-2) if cfg.mode == "sharing" else _turned(parts)


def _branch(cfg: MoRAConfig, M: Tensor, x: Tensor, d_out: int) -> Tensor:
    """unfold(M fold(x)), (..., d_out)."""
    h = F.linear(_parts(cfg, x, M.shape[-1]), M)
    return _wrapped(h if cfg.mode == "sharing" else h.flatten(-2), d_out)


def outputs(cfg: MoRAConfig, p: Params, d: None, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + unfold(M fold(x))."""
    M = p["lora_M"]
    return (y + _branch(cfg, M, low_rank.cast(x, M.dtype), site.d_out)).to(y.dtype)


def weight(
    cfg: MoRAConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + the branch of the unit vectors."""
    unit = torch.eye(site.d_in, dtype=W.dtype, device=W.device)
    return W + _branch(cfg, p["lora_M"].to(W.dtype), unit, site.d_out).mT, b


def dense(cfg: MoRAConfig, site: Site, tokens: int) -> Forms:
    """The branch for each row of x, or for d_in unit vectors."""
    k = _side(cfg, site)
    parts = 1 if cfg.mode == "sharing" else -(-site.d_in // k)
    row = Work(parts * k * k, passes=3 * (site.d_in + site.d_out))
    return Forms(row, Work(site.d_in * row.multiply_adds, passes=site.d_in * row.passes))


def scale(cfg: MoRAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """M times c."""
    return {"lora_M": p["lora_M"] * c}


VARIANT = Variant(
    name="mora",
    good_for="high rank at LoRA's count",
    config=MoRAConfig,
    paper="Jiang et al. 2024, arXiv 2405.12130",
    param_specs=param_specs,
    outputs=outputs,
    weight=weight,
    additive=True,
    dense=dense,
    scale=scale,
)
