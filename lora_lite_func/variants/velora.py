"""VeLoRA: a LoRA that keeps a compressed x for the gradient of A.

    y' = y + s (x A^T) B^T        s = alpha / r
    A (r, d_in), B (d_out, r)
    in training the gradient of A is that with x^ = scale c e^T in x's place, group by group:
    x_g (T, G, g) the features in G groups, c = x_g e (T, G), e (g,) the groups' mean, normalised

The gradients of B and of x are exact. What is kept for A is c and e, T G numbers for T d_in, which
saves memory where nothing else keeps x: the base is frozen, so a layer's input is kept for its
adapter alone. Dropout keeps a mask of x's size. Frozen A (LoRA-FA) keeps T r, exactly. Paper: Miles
et al. 2024, arXiv 2405.17991; e is made anew from each batch, so there is no state.
Identity at the start: B = 0. Needs only x and y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import AdapterConfig, probability, record
from ..core.errors import ConfigError
from ..core.method import Layer, ParamSpec, Variant
from ..core.random import kaiming
from ..core.site import Params, Site
from ..kernels import low_rank
from . import _pair


@dataclass(frozen=True, kw_only=True)
class VeLoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        num_groups: G, how many numbers are kept of each token's x.
        gradient_scale: of the gradient of A.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    num_groups: int = record(64)
    gradient_scale: float = record(1.0)
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "VeLoRAConfig.dropout")
        if self.num_groups < 1:
            raise ConfigError(
                f"VeLoRAConfig.num_groups: expected at least 1, found {self.num_groups}"
            )


def param_specs(cfg: VeLoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (r, d_in), lora_B (d_out, r)."""
    return {
        "lora_A": ParamSpec((site.r, site.d_in), kaiming, rank_axis=0),
        "lora_B": ParamSpec((site.d_out, site.r), rank_axis=1),
    }


def prepare(cfg: VeLoRAConfig, p: Params, site: Site, layer: Layer) -> bool:
    """Whether A is trained."""
    return layer.training


def outputs(cfg: VeLoRAConfig, p: Params, d: bool, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + s (x A^T) B^T. In training, A's gradient goes through a second x^ A^T, whose value is
    taken off again.
    """
    A = p["lora_A"]
    if not (d and torch.is_grad_enabled()):
        return low_rank.add(y, x, A, p["lora_B"], site.scale)
    h = low_rank.project(x, A.detach())  # (..., r)
    told = _through_groups(cfg, x.detach(), A).to(h.dtype)
    return low_rank.expand(y, h + (told - told.detach()), p["lora_B"], site.scale)


def _through_groups(cfg: VeLoRAConfig, x: Tensor, A: Tensor) -> Tensor:
    """x^ A^T = scale c (A_g e)^T, (..., r), for which c (..., G) is kept and not x^."""
    x_g, A_g = _grouped(x, cfg.num_groups), _grouped(A, cfg.num_groups)
    e = _direction(x_g)
    c = x_g @ e.to(x_g.dtype)
    return F.linear(low_rank.cast(c, A.dtype), A_g @ e.to(A.dtype)) * cfg.gradient_scale


def _grouped(t: Tensor, groups: int) -> Tensor:
    """(..., d_in) as (..., G, g), with zeros at the end."""
    width = -(-t.shape[-1] // groups)
    return F.pad(t, (0, groups * width - t.shape[-1])).unflatten(-1, (groups, width))


def _direction(x_g: Tensor) -> Tensor:
    """e (g,): the mean over tokens and groups, of norm 1; equal entries where it is zero."""
    core = low_rank.core_dtype(x_g.dtype)
    e = x_g.flatten(0, -2).to(core).mean(0)
    norm = e.norm()
    return torch.where(norm > 0, e / norm, e.shape[0] ** -0.5)


VARIANT = Variant(
    name="velora",
    good_for="little memory where inputs fill it",
    config=VeLoRAConfig,
    paper="Miles et al. 2024, arXiv 2405.17991",
    param_specs=param_specs,
    prepare=prepare,
    outputs=outputs,
    weight=_pair.weight,
    additive=True,
    scale=_pair.scale,
    low_rank_factors=_pair.low_rank_factors,
    phases_in_training=True,
    sites=("linear",),
)
