"""SSVD: the top singular directions are rotated on the input side, their values shifted.

    W' = W + U [ (S + dS) G - S ] V^T
    U (d_out, k), S (k,), V^T lora_Vh (k, d_in) frozen;   dS (k,), K (k, k) skew
    y' = y + (x V) [ diag(dS) + diag(S + dS)(G - I) ]^T U^T
    first_order: G = I - 2K;   cayley: G = (I - K)(I + K)^-1

Paper: Wang et al. 2025, arXiv 2509.02830 (first order by default; k there is 20 to 80 % of the
smaller side).
Identity at the start: dS = 0 and K = 0, exactly. Needs W once, for the decomposition. alpha has no
part in this method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.method import MATRICES, Layer, ParamSpec, Variant
from ..core.site import Params, Site
from ..core.update_functions import Forms, Work
from ..kernels import cayley, low_rank


@dataclass(frozen=True, kw_only=True)
class SSVDConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part in this method), and:

    Args:
        r: k, how many of the top singular directions are active.
        mode: "first_order" (paper) or "cayley" (exactly orthogonal).
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    r: int = 64
    mode: Literal["first_order", "cayley"] = "first_order"
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "SSVDConfig.dropout")


def param_specs(cfg: SSVDConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_delta_s (k,), lora_rot_K (k (k - 1) / 2,); frozen lora_U, lora_S, lora_Vh.

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "SSVD")
    return {
        "lora_delta_s": ParamSpec((site.r,), dtype=torch.float32),
        "lora_rot_K": ParamSpec((cayley.pairs(site.r),), dtype=torch.float32),
        "lora_U": ParamSpec((site.d_out, site.r), trainable=False),
        "lora_S": ParamSpec((site.r,), trainable=False, dtype=torch.float32),
        "lora_Vh": ParamSpec((site.r, site.d_in), trainable=False),
    }


def init(
    cfg: SSVDConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The top k singular triplets."""
    U, S, Vh = low_rank.top_svd(weight, site.r, None, generator("lora_U"))
    return {"lora_U": U, "lora_S": S, "lora_Vh": Vh}


def _core(cfg: SSVDConfig, p: Params, dtype: torch.dtype) -> Tensor:
    """diag(dS) + diag(S + dS)(G - I), (k, k)."""
    S, shift, K = (p[n].to(dtype) for n in ("lora_S", "lora_delta_s", "lora_rot_K"))
    k = S.shape[0]
    turn = -2.0 * cayley.skew(K, k) if cfg.mode == "first_order" else cayley.minus_identity(-K, k)
    return torch.diag_embed(shift) + (S + shift)[:, None] * turn


def prepare(cfg: SSVDConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """The k x k matrix between V and U."""
    return _core(cfg, p, p["lora_S"].dtype)


def outputs(cfg: SSVDConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + (x V) core^T U^T."""
    Vh = p["lora_Vh"]
    h = low_rank.project(x, Vh)  # (..., k)
    return low_rank.expand(y, F.linear(h, d.to(h.dtype)), p["lora_U"])


def weight(
    cfg: SSVDConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + U core V^T."""
    core = _core(cfg, p, W.dtype)
    return low_rank.add_dense(W, core @ p["lora_Vh"].to(W.dtype), p["lora_U"]), b


def dense(cfg: SSVDConfig, site: Site, tokens: int) -> Forms:
    """The branch, or the update built."""
    size = site.d_in * site.d_out
    return Forms(Work(site.r * (site.d_in + site.d_out)), Work(site.r * size, passes=size))


def scale(cfg: SSVDConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """dS and K times c."""
    return {**p, "lora_delta_s": p["lora_delta_s"] * c, "lora_rot_K": p["lora_rot_K"] * c}


VARIANT = Variant(
    name="ssvd",
    good_for="new domains, the weight's own directions",
    config=SSVDConfig,
    paper="Wang et al. 2025, arXiv 2509.02830",
    param_specs=param_specs,
    init=init,
    prepare=prepare,
    outputs=outputs,
    adds=True,
    weight=weight,
    dense=dense,
    scale=scale,
    needs=frozenset({"weight"}),
    sites=(*MATRICES, "embedding"),
)
