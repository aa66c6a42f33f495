"""AdaLoRA: a low-rank update as a singular value decomposition whose values can be pruned.

    y' = y + s ((x Q^T) * lam) P^T      s = alpha / r
    Q lora_A (r, d_in), lam lora_E (r,), P lora_B (d_out, r)

Paper: Zhang et al. 2023, arXiv 2303.10512. A penalty in the loss keeps P and Q near orthonormal;
their form doesn't. (PEFT divides by r + 1e-5.)
Identity at the start: lam = 0. Needs only x and y.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.method import MATRICES, Layer, ParamSpec, Variant
from ..core.phase_functions import Map
from ..core.random import normal
from ..core.site import Params, Site
from ..core.update_functions import Factors
from ..kernels import low_rank

_STD = 0.02  # of the start of P and Q, as in the released code


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r is the rank before any pruning), and:

    Args:
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "AdaLoRAConfig.dropout")


def param_specs(cfg: AdaLoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (r, d_in), lora_E (r,), lora_B (d_out, r)."""
    return {
        "lora_A": ParamSpec((site.r, site.d_in), normal(_STD), rank_axis=0),
        "lora_E": ParamSpec((site.r,), rank_axis=0),
        "lora_B": ParamSpec((site.d_out, site.r), normal(_STD), rank_axis=1),
    }


def prepare(cfg: AdaLoRAConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """diag(lam) Q, (r, d_in)."""
    return p["lora_E"].unsqueeze(-1) * p["lora_A"]


def outputs(cfg: AdaLoRAConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + s (x (diag(lam) Q)^T) P^T."""
    return low_rank.add(y, x, d, p["lora_B"], site.scale)


def called_outputs(
    cfg: AdaLoRAConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site, A: Map, B: Map
) -> Tensor:
    """y + s P(lam * Q(x))."""
    return low_rank.add_called(y, x, A, B, site.scale, p["lora_E"])


def weight(
    cfg: AdaLoRAConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + s P diag(lam) Q."""
    return low_rank.add_dense(
        W, p["lora_E"].to(W.dtype)[:, None] * p["lora_A"].to(W.dtype), p["lora_B"], site.scale
    ), b


def scale(cfg: AdaLoRAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """lam times c."""
    return {**p, "lora_E": p["lora_E"] * c}


def low_rank_factors(cfg: AdaLoRAConfig, p: Params, site: Site) -> Factors:
    """diag(lam) Q, P and alpha / r."""
    return p["lora_E"].unsqueeze(-1) * p["lora_A"], p["lora_B"], site.scale


VARIANT = Variant(
    name="adalora",
    good_for="sharing a budget of ranks out",
    config=AdaLoRAConfig,
    paper="Zhang et al. 2023, arXiv 2303.10512",
    param_specs=param_specs,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    additive=True,
    scale=scale,
    low_rank_factors=low_rank_factors,
    called_outputs=called_outputs,
    batched=True,
    sites=(*MATRICES, "embedding"),
)
