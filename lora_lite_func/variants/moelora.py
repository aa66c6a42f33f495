"""MoE-LoRA: several LoRAs at a layer, of which each token has a mixture that a router learns.

    y' = y + s sum over e of g_e (x A_e^T) B_e^T        s = alpha / r
    g = softmax(x R^T / t)                              of the top_k largest entries, or of all
    A_e (r, d_in), one for all experts or one each; B_e (d_out, r); R (E, d_in)

With one A for all experts it is HydraLoRA, with one each MoLoRA, with top_k MixLoRA's routing.
Papers: HydraLoRA, Tian et al. 2024, arXiv 2404.19245; MoLoRA, Zadouri et al. 2023, arXiv
2309.05444; MixLoRA, Li et al. 2024, arXiv 2404.15159.
Identity at the start: B = 0. Needs only x and y. The mixture depends on the token, so no weight can
stand for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.errors import ConfigError
from ..core.method import ParamSpec, Variant
from ..core.random import kaiming
from ..core.site import Params, Site
from ..kernels.gates import gates, probabilities
from ..kernels.low_rank import project
from ..kernels.mixture import add_mixture
from ._pair import scale


@dataclass(frozen=True, kw_only=True)
class MoELoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        experts: how many pairs of factors a layer has.
        shared_A: one lora_A for all experts (HydraLoRA), instead of one each (MoLoRA).
        top_k: how many experts each token has; None for all of them.
        temperature: what the router's logits are divided by.
        dropout: probability of dropping an entry of the branch's input, the router's too, in
            training mode only.
    """

    experts: int = 3
    shared_A: bool = True
    top_k: int | None = None
    temperature: float = 1.0
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "MoELoRAConfig.dropout")
        if self.experts < 1:
            raise ConfigError(f"MoELoRAConfig.experts: expected at least 1, found {self.experts}")
        if self.top_k is not None and not 1 <= self.top_k <= self.experts:
            raise ConfigError(
                f"MoELoRAConfig.top_k: expected 1 to experts={self.experts}, found {self.top_k}"
            )
        if self.temperature <= 0.0:
            raise ConfigError(
                f"MoELoRAConfig.temperature: expected more than 0, found {self.temperature}"
            )


def param_specs(cfg: MoELoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (r, d_in) or (E, r, d_in), lora_B (E, d_out, r), lora_route (E, d_in)."""
    own = () if cfg.shared_A else (cfg.experts,)
    return {
        "lora_A": ParamSpec((*own, site.r, site.d_in), kaiming, rank_axis=len(own)),
        "lora_B": ParamSpec((cfg.experts, site.d_out, site.r), rank_axis=2),
        "lora_route": ParamSpec((cfg.experts, site.d_in), kaiming),
    }


def router(cfg: MoELoRAConfig, p: Params, d: None, x: Tensor, site: Site) -> Tensor:
    """softmax(x R^T / t) over all experts, (..., E)."""
    return probabilities(project(x, p["lora_route"]), cfg.temperature)


def outputs(cfg: MoELoRAConfig, p: Params, d: None, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + s sum over e of g_e (x A_e^T) B_e^T."""
    g = gates(project(x, p["lora_route"]), cfg.top_k, cfg.temperature)  # (..., E)
    return add_mixture(y, x, p["lora_A"], p["lora_B"], site.scale, g)


VARIANT = Variant(
    name="moelora",
    good_for="mixed data, experts chosen by token",
    config=MoELoRAConfig,
    paper="HydraLoRA, Tian et al. 2024, arXiv 2404.19245; MoLoRA, Zadouri et al. 2023, "
    "arXiv 2309.05444",
    param_specs=param_specs,
    outputs=outputs,
    router=router,
    scale=scale,
    adds=True,
)
