"""Arrow: trained LoRAs at a layer, of which each token has those whose direction it is nearest to.

    y' = y + s sum over e of g_e (x A_e^T) B_e^T        s = alpha / r
    g = softmax(|x P^T| / t)                            of the top_k largest entries
    A_e (r, d_in), B_e (d_out, r); P (E, d_in) frozen, each row the top right singular vector of its
    expert's B_e A_e, a unit vector

Nothing is learned to route: `ll.arrow` makes an adapter of this method out of trained LoRAs.
Papers: Ostapenko et al. 2024, arXiv 2405.11157; GenKnowSub (`ll.arrow(..., general=)`), ACL 2025,
short papers 54.
An adapter that `ll.init` makes has new experts (B = 0, so it is the identity) and random
directions. Needs only x and y. The mixture depends on the token, so no weight can stand for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import ConfigError
from ..core.method import ParamSpec, Variant
from ..core.random import kaiming, normal
from ..core.site import Params, Site
from ..kernels.gates import gates, probabilities
from ..kernels.low_rank import project
from ..kernels.mixture import add_mixture
from ._pair import scale


@dataclass(frozen=True, kw_only=True)
class ArrowConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        experts: how many pairs of factors a layer has.
        top_k: how many experts each token has.
        temperature: what the likenesses are divided by.
    """

    experts: int = 4
    top_k: int = 3
    temperature: float = 1.0

    def validate(self) -> None:
        if self.experts < 1:
            raise ConfigError(f"ArrowConfig.experts: expected at least 1, found {self.experts}")
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(
                f"ArrowConfig.top_k: expected 1 to experts={self.experts}, found {self.top_k}"
            )
        if self.temperature <= 0.0:
            raise ConfigError(
                f"ArrowConfig.temperature: expected more than 0, found {self.temperature}"
            )


def _direction(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random unit vectors."""
    return torch.nn.functional.normalize(normal(1.0)(shape, generator), dim=-1)


def param_specs(cfg: ArrowConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (E, r, d_in), lora_B (E, d_out, r), frozen lora_proto (E, d_in)."""
    return {
        "lora_A": ParamSpec((cfg.experts, site.r, site.d_in), kaiming, rank_axis=1),
        "lora_B": ParamSpec((cfg.experts, site.d_out, site.r), rank_axis=2),
        "lora_proto": ParamSpec((cfg.experts, site.d_in), _direction, trainable=False),
    }


def router(cfg: ArrowConfig, p: Params, d: None, x: Tensor, site: Site) -> Tensor:
    """softmax(|x P^T| / t) over all experts, (..., E)."""
    return probabilities(project(x, p["lora_proto"]).abs(), cfg.temperature)


def outputs(cfg: ArrowConfig, p: Params, d: None, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + s sum over e of g_e (x A_e^T) B_e^T."""
    g = gates(project(x, p["lora_proto"]).abs(), cfg.top_k, cfg.temperature)  # (..., E)
    return add_mixture(y, x, p["lora_A"], p["lora_B"], site.scale, g)


VARIANT = Variant(
    name="arrow",
    good_for="trained adapters without known tasks",
    config=ArrowConfig,
    paper="Ostapenko et al. 2024, arXiv 2405.11157",
    param_specs=param_specs,
    outputs=outputs,
    router=router,
    scale=scale,
    adds=True,
)
