"""HRA: the layer's input goes through a chain of r Householder reflections.

    W' = W R,   R = H_0 H_1 ... H_{r-1},   H_i = I - 2 u_i u_i^T / |u_i|^2
    U (r, d_in), rows u_i
    compact WY:  R = I - U^T T U,   T^-1 = striu(U U^T) + 1/2 diag(|u_i|^2)
    x' = x - ((x U^T) T^T) U

Paper: Yuan, Liu and Xu 2024, arXiv 2405.17484. (WY: Schreiber and Van Loan 1989; this T: Joffrain
et al. 2006.)
Identity at the start: rows in equal pairs cancel (to rounding: 1e-7 in float32), hence r is even.
Needs only x. Rows start with unit norm: the map doesn't depend on their length, but the angle of an
optimizer's step does. alpha has no part in this method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import ConfigError
from ..core.method import Layer, ParamSpec, Variant
from ..core.random import normal
from ..core.site import Params, Site
from ..kernels import low_rank


@dataclass(frozen=True, kw_only=True)
class HRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r is the number of reflections, even; alpha has no part in
    this method).
    """

    def validate(self) -> None:
        for r in (self.r, *(r for _, r in self.rank_pattern)):
            if r % 2:
                raise ConfigError(
                    f"HRAConfig.r: reflections come in pairs (an odd number is never the "
                    f"identity), expected even, found {r}"
                )


def param_specs(cfg: HRAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_U (r, d_in), a reflection per row."""
    return {"lora_U": ParamSpec((site.r, site.d_in))}


def init(
    cfg: HRAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """Unit rows in equal pairs."""
    half = normal(1.0)((site.r // 2, site.d_in), generator("lora_U"))
    rows = F.normalize(half, dim=1).repeat_interleave(2, dim=0)  # u_0 = u_1, u_2 = u_3, ...
    return {"lora_U": rows}


def _T(U: Tensor) -> Tensor:
    """T (r, r), upper triangular, in U's dtype."""
    gram = U @ U.mT
    square = gram.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(U.dtype).tiny)
    inverse = gram.triu(1) + torch.diag_embed(0.5 * square)
    eye = torch.eye(U.shape[0], dtype=U.dtype, device=U.device)
    return torch.linalg.solve_triangular(inverse, eye, upper=True)


def prepare(cfg: HRAConfig, p: Params, site: Site, layer: Layer) -> tuple[Tensor, Tensor]:
    """U in the core dtype and T of the compact WY form."""
    U = p["lora_U"].to(low_rank.core_dtype(p["lora_U"].dtype))
    return U, _T(U)


def inputs(cfg: HRAConfig, p: Params, d: tuple[Tensor, Tensor], x: Tensor, site: Site) -> Tensor:
    """x' = x - ((x U^T) T^T) U."""
    U, T = d
    h = F.linear(low_rank.cast(x, p["lora_U"].dtype), p["lora_U"])  # (..., r)
    z = F.linear(h.to(T.dtype), T)  # (..., r)
    return low_rank.expand(x, z, U.mT, -1.0)


def weight(
    cfg: HRAConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W R = W - (W U^T) T U."""
    U = p["lora_U"].to(low_rank.core_dtype(W.dtype))
    return torch.addmm(W, (W @ U.mT) @ _T(U), U, alpha=-1.0), b


def scale(cfg: HRAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """Each pair of reflections is a rotation by twice the angle between its rows: turn the second
    row to c times that angle.
    """
    U = p["lora_U"]
    pairs = U.to(low_rank.core_dtype(U.dtype)).unflatten(-2, (-1, 2))
    first, second = F.normalize(pairs, dim=-1).unbind(-2)  # (..., r/2, d_in) each
    cosine = (first * second).sum(-1, keepdim=True)
    across = second - cosine * first  # the part of the second row off the first
    sine = across.norm(dim=-1, keepdim=True)
    angle = torch.atan2(sine, cosine) * c
    direction = across / sine.clamp_min(torch.finfo(sine.dtype).tiny)
    turned = angle.cos() * first + angle.sin() * direction
    return {"lora_U": torch.stack([first, turned], dim=-2).flatten(-3, -2).to(U.dtype)}


VARIANT = Variant(
    name="hra",
    good_for="orthogonal updates at LoRA's cost",
    config=HRAConfig,
    paper="Yuan, Liu and Xu 2024, arXiv 2405.17484",
    param_specs=param_specs,
    init=init,
    prepare=prepare,
    inputs=inputs,
    weight=weight,
    scale=scale,
)
