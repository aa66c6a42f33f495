"""LoHa: the update is the elementwise product of two low-rank matrices, of a rank up to r^2.

    W' = W + s (B1 A1) * (B2 A2)      B1, B2 (d_out, r); A1, A2 (r, d_in); s = alpha / r
    Khatri-Rao:  (B1 A1) * (B2 A2) = Bk Ak
    Bk[o, ij] = B1[o, i] B2[o, j] (d_out, r^2),   Ak[ij] = A1[i] * A2[j] (r^2, d_in)

ABBA starts B1 and A1 at the weight's top r singular triplets, a root of the values on either side.

Papers: FedPara, Hyeon-Woo, Ye-Bin and Oh 2021, arXiv 2108.06098; LyCORIS, Yeh et al. 2023, arXiv
2309.14859; ABBA, Singhal et al. 2025, arXiv 2505.14238 (with a scale of its own there). The branch
is a LoRA of rank r^2; where that costs more than the layer itself, by sizes alone, the update is
built instead.
Identity at the start: A2 = 0, or in ABBA B2 = 0. Needs only x and y; ABBA W once, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability, record
from ..core.errors import ConfigError
from ..core.method import MATRICES, Layer, ParamSpec, Variant
from ..core.random import kaiming
from ..core.site import Params, Site
from ..core.update_functions import Forms, Work
from ..kernels import low_rank


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; the update has rank r^2), and:

    Args:
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "LoHaConfig.dropout")


def param_specs(cfg: LoHaConfig, site: Site) -> dict[str, ParamSpec]:
    """B1 lora_w1_a, A1 lora_w1_b, B2 lora_w2_a, A2 lora_w2_b."""
    a, b = (site.r, site.d_in), (site.d_out, site.r)
    return {
        "lora_w1_a": ParamSpec(b, kaiming, rank_axis=1),
        "lora_w1_b": ParamSpec(a, kaiming, rank_axis=0),
        "lora_w2_a": ParamSpec(b, kaiming, rank_axis=1),
        "lora_w2_b": ParamSpec(a, rank_axis=0),
    }


@dataclass(frozen=True, kw_only=True)
class ABBAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; the update has rank r^2), and:

    Args:
        dropout: probability of dropping an entry of the branch's input, in training mode only.
        svd_niter: None for the full SVD; a number for the randomised one with that many power
            iterations (4 to 16).
    """

    dropout: float = 0.0
    svd_niter: int | None = record(None)

    def validate(self) -> None:
        probability(self.dropout, "ABBAConfig.dropout")
        if self.svd_niter is not None and self.svd_niter < 0:
            raise ConfigError(
                f"ABBAConfig.svd_niter: expected None or at least 0, found {self.svd_niter}"
            )


def abba_param_specs(cfg: ABBAConfig, site: Site) -> dict[str, ParamSpec]:
    """LoHa's tensors, with the zeros in B2.

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "ABBA")
    a, b = (site.r, site.d_in), (site.d_out, site.r)
    return {
        "lora_w1_a": ParamSpec(b, rank_axis=1),
        "lora_w1_b": ParamSpec(a, rank_axis=0),
        "lora_w2_a": ParamSpec(b, rank_axis=1),
        "lora_w2_b": ParamSpec(a, kaiming, rank_axis=0),
    }


def abba_init(
    cfg: ABBAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The weight's principal part as the first pair."""
    U, S, Vh = low_rank.top_svd(weight, site.r, cfg.svd_niter, generator("lora_w1_a"))
    root = S.sqrt()  # (r,)
    return {"lora_w1_a": U * root, "lora_w1_b": root[:, None] * Vh}


def _dense(p: Params) -> Tensor:
    """(B1 A1) * (B2 A2), (d_out, d_in)."""
    return (p["lora_w1_a"] @ p["lora_w1_b"]) * (p["lora_w2_a"] @ p["lora_w2_b"])


def prepare(
    cfg: AdapterConfig, p: Params, site: Site, layer: Layer
) -> tuple[Tensor, Tensor | None]:
    """(Ak, Bk) of rank r^2, or (the dense update, None) where that is cheaper."""
    if site.r**2 * (site.d_in + site.d_out) > site.d_in * site.d_out:
        return _dense(p), None
    B = (p["lora_w1_a"].unsqueeze(2) * p["lora_w2_a"].unsqueeze(1)).flatten(1)  # (d_out, r^2)
    A = (p["lora_w1_b"].unsqueeze(1) * p["lora_w2_b"].unsqueeze(0)).flatten(0, 1)  # (r^2, d_in)
    return A, B


def outputs(
    cfg: AdapterConfig, p: Params, d: tuple[Tensor, Tensor | None], x: Tensor, y: Tensor, site: Site
) -> Tensor:
    """y + s (x Ak^T) Bk^T."""
    A, B = d
    if B is None:
        return (y + low_rank.project(x, A * site.scale)).to(y.dtype)
    return low_rank.add(y, x, A, B, site.scale)


def weight(
    cfg: AdapterConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + s (B1 A1) * (B2 A2)."""
    B1, A1, B2, A2 = (p[f"lora_{name}"].to(W.dtype) for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    return low_rank.plus_times(W, B1 @ (A1 * site.scale), B2 @ A2), b


def dense(cfg: AdapterConfig, site: Site, tokens: int) -> Forms:
    """Where the update is built for less than the branch of rank r^2 costs."""
    size = site.d_in * site.d_out
    row = Work(site.r**2 * (site.d_in + site.d_out))
    return Forms(row, Work(2 * site.r * size, passes=3 * size))


def scale(cfg: AdapterConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """One factor times c."""
    return {**p, "lora_w2_b": p["lora_w2_b"] * c}


VARIANT = Variant(
    name="loha",
    good_for="high rank from few numbers",
    config=LoHaConfig,
    paper="Hyeon-Woo, Ye-Bin and Oh 2021, arXiv 2108.06098; Yeh et al. 2023, arXiv 2309.14859",
    param_specs=param_specs,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    additive=True,
    dense=dense,
    scale=scale,
    sites=(*MATRICES, "embedding"),
)

VARIANT_ABBA = Variant(
    name="abba",
    good_for="LoHa that starts at the weight",
    config=ABBAConfig,
    paper="Singhal et al. 2025, arXiv 2505.14238",
    param_specs=abba_param_specs,
    init=abba_init,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    additive=True,
    dense=dense,
    scale=scale,
    needs=frozenset({"weight"}),
    sites=(*MATRICES, "embedding"),
)
