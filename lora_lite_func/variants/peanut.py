"""PEANuT: a low-rank update whose inner factor is a small network's view of the weight.

    W' = W + alpha B G,   G = (r, d_in) of the network:
    G_0 = f(A W);   G_{i+1} = f(E_i G_i), i < depth;   then down again, f(D_i G) + G_{depth-1-i}
    A (r, d_out), B (d_out, r), E_i and D_i lora_E, lora_D (depth, r, r), f elementwise

So it is a LoRA whose A is G, made once per call: r rows through W, and a branch of rank r.
Paper: Zhong et al. 2024, arXiv 2410.01870. W is what is beneath this adapter.
Identity at the start: B = 0. Multiplies the dense weight in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.errors import ConfigError
from ..core.method import MATRICES, Layer, ParamSpec, Variant
from ..core.random import kaiming
from ..core.site import Params, Site
from ..kernels import low_rank
from ._pair import scale

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True, kw_only=True)
class PEANuTConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        alpha: strength, which isn't divided by r here.
        depth: how many layers the network has on its way in, and as many on its way back.
        activation: "relu", "gelu", "silu", "tanh" or "sigmoid".
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    r: int = 32
    alpha: float = 1.0
    depth: int = 0
    activation: Literal["relu", "gelu", "silu", "tanh", "sigmoid"] = "relu"
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "PEANuTConfig.dropout")
        if self.depth < 0:
            raise ConfigError(f"PEANuTConfig.depth: expected at least 0, found {self.depth}")


def param_specs(cfg: PEANuTConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (r, d_out), lora_B (d_out, r), and with a depth lora_E, lora_D (depth, r, r)."""
    specs = {
        "lora_A": ParamSpec((site.r, site.d_out), kaiming),
        "lora_B": ParamSpec((site.d_out, site.r)),
    }
    if cfg.depth:
        square = ParamSpec((cfg.depth, site.r, site.r), kaiming)
        specs |= {"lora_E": square, "lora_D": square}
    return specs


def _inner(cfg: PEANuTConfig, p: Params, W: Tensor) -> Tensor:
    """G (r, d_in), float32 at least: all that has W's size is the first product's operand."""
    f, core = _ACTIVATIONS[cfg.activation], low_rank.core_dtype(W.dtype)
    G = f((p["lora_A"].to(W.dtype) @ W).to(core))
    if not cfg.depth:
        return G
    skipped = []
    for E in p["lora_E"].to(core).unbind(0):
        skipped.append(G)
        G = f(E @ G)
    for D in p["lora_D"].to(core).unbind(0):
        G = f(D @ G) + skipped.pop()
    return G


def prepare(cfg: PEANuTConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """G of what is beneath."""
    W = layer.current_weight() if layer.is_changed else layer.weight
    dtype = p["lora_A"].dtype
    return _inner(cfg, p, W.to(torch.promote_types(W.dtype, dtype))).to(dtype)


def outputs(cfg: PEANuTConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + alpha (x G^T) B^T."""
    return low_rank.add(y, x, d, p["lora_B"], site.scale)


def weight(
    cfg: PEANuTConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + alpha B G."""
    return low_rank.add_dense(W, _inner(cfg, p, W), p["lora_B"], site.scale), b


def scaling(cfg: PEANuTConfig, site: Site) -> float:
    """alpha."""
    return site.alpha


VARIANT = Variant(
    name="peanut",
    good_for="updates that depend on the weight",
    config=PEANuTConfig,
    paper="Zhong et al. 2024, arXiv 2410.01870",
    param_specs=param_specs,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    scale=scale,
    scaling=scaling,
    sites=(*MATRICES, "embedding"),
)
