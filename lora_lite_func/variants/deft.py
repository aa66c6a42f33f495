"""DEFT: a few directions leave the layer's output, and a learned map fills them; PaRa: they leave.

    W' = W + Q [ R - right(P)^T W ]        P (d_out, r), R (r, d_in)
    relu: Q = P, right(P) = relu(P);   qr: Q = right(P) = the orthonormal factor of P
    R = right0^T W + rho, right0 = right(P at the start) (d_out, r) frozen, rho (r, d_in), so
    y' = y + [ x rho^T + (y - b)(right0 - right(P)) ] Q^T

Papers: DEFT, Kumar et al. 2025, NeurIPS 2025. PaRa (`para=True`: no R, so right0 = 0 and rho = 0):
Chen et al. 2024. In this form W isn't read, and R is at its paper's start while rho is 0.
Identity at the start: rho = 0 and right(P) = right0, exactly; PaRa's start is not the identity.
Needs x and y, and the bias. alpha has no part in this method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import UnsupportedError
from ..core.method import MATRICES, Layer, ParamSpec, Variant
from ..core.random import normal
from ..core.site import Params, Site
from ..core.update_functions import Forms, Work
from ..kernels import low_rank

Prepared: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""gain Q (d_out, r), right0 - right(P) (d_out, r), and what the bias adds to its product (r,)."""


@dataclass(frozen=True, kw_only=True)
class DEFTConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part in this method). It has no dropout, which
    would disturb what leaves the output, too.

    Args:
        decomposition: "relu" (paper) or "qr" (an orthogonal projection).
        para: PaRa: the directions leave and nothing fills them.
    """

    decomposition: Literal["relu", "qr"] = "relu"
    para: bool = False


def param_specs(cfg: DEFTConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_P (d_out, r), lora_R (r, d_in); frozen lora_right0 (d_out, r), and the
    strength lora_gain (), which is not linear in a trained tensor. PaRa has P and the strength.

    Raises:
        UnsupportedError: r is above d_out.
    """
    if site.r > site.d_out:
        raise UnsupportedError(
            f"DEFT takes r of d_out directions, expected a rank of at most {site.d_out}, found "
            f"r={site.r}; lower r, or set it there with rank_pattern"
        )
    specs = {
        "lora_P": ParamSpec((site.d_out, site.r), normal(0.02), dtype=torch.float32),
        "lora_gain": ParamSpec((), "ones", trainable=False, dtype=torch.float32),
    }
    if not cfg.para:
        specs["lora_R"] = ParamSpec((site.r, site.d_in))
        specs["lora_right0"] = ParamSpec((site.d_out, site.r), trainable=False, dtype=torch.float32)
    return specs


def _directions(cfg: DEFTConfig, P: Tensor) -> tuple[Tensor, Tensor]:
    """Q and right(P), (d_out, r) each. Columns of Q point as those of P do, whatever the device's
    decomposition.
    """
    if cfg.decomposition == "relu":
        return P, P.relu()
    Q, R = torch.linalg.qr(P)
    sign = R.detach().diagonal(dim1=-2, dim2=-1).sign()
    Q = Q * torch.where(sign == 0, 1.0, sign).unsqueeze(-2)
    return Q, Q


def init(
    cfg: DEFTConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """P, and what it removes at the start."""
    P = normal(0.02)((site.d_out, site.r), generator("lora_P")).double()
    return {"lora_P": P} if cfg.para else {"lora_P": P, "lora_right0": _directions(cfg, P)[1]}


def _parts(cfg: DEFTConfig, p: Params, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gain Q and right0 - right(P), (d_out, r) each."""
    Q, right = _directions(cfg, p["lora_P"].to(dtype))
    kept = -right if cfg.para else p["lora_right0"].to(dtype) - right
    return Q * p["lora_gain"].to(dtype), kept


def prepare(cfg: DEFTConfig, p: Params, site: Site, layer: Layer) -> Prepared:
    """The directions, and what the bias, which no direction leaves, adds to their product."""
    Q, kept = _parts(cfg, p, p["lora_P"].dtype)
    bias = layer.bias
    return Q, kept, None if bias is None else bias.to(kept.dtype) @ kept


def outputs(cfg: DEFTConfig, p: Params, d: Prepared, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + [ x rho^T + (y - b)(right0 - right(P)) ] Q^T."""
    Q, kept, shift = d
    h = low_rank.project(y, kept.mT)  # (..., r)
    if shift is not None:
        h = h - shift.to(h.dtype)
    if not cfg.para:
        h = h + low_rank.project(x, p["lora_R"])
    return low_rank.expand(y, h, Q)


def weight(
    cfg: DEFTConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + Q (rho + (right0 - right(P))^T W)."""
    Q, kept = _parts(cfg, p, W.dtype)
    fill = kept.mT @ W  # (r, d_in)
    return low_rank.add_dense(W, fill if cfg.para else fill + p["lora_R"].to(W.dtype), Q), b


def dense(cfg: DEFTConfig, site: Site, tokens: int) -> Forms:
    """The three thin products, or W' built."""
    size = site.d_in * site.d_out
    return Forms(Work(site.r * (site.d_in + 2 * site.d_out)), Work(2 * site.r * size, passes=size))


def scale(cfg: DEFTConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """The strength times c."""
    return {**p, "lora_gain": p["lora_gain"] * c}


VARIANT = Variant(
    name="deft",
    good_for="replacing few directions of the output",
    config=DEFTConfig,
    paper="Kumar et al. 2025, NeurIPS 2025 (DEFT)",
    param_specs=param_specs,
    init=init,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    dense=dense,
    scale=scale,
    sites=(*MATRICES, "embedding"),
)
