"""MiSS (earlier Bone): one small matrix shared by all shards of the input.

    plain:  y' = y + S D,   S = sum_g x[g r : (g + 1) r]        D (r, d_out)
            W' = W + (D^T repeated along the inputs)
    mini:   D (r, mini_r) is also repeated along the outputs
    bat:    W'_oi = W_oi + W_oi D_o + D_o, in blocks of r x r   D (d_out / r, r, r)

Paper: Kang and Yin 2024, arXiv 2409.15371. Where r doesn't divide d_in, x is padded with zeros
(plain and mini).
Identity at the start: D = 0. Needs only x and y; "bat" multiplies the dense weight in every call.
alpha has no part in this method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.errors import ConfigError
from ..core.method import Layer, ParamSpec, Variant
from ..core.site import Params, Site
from ..kernels import block_diagonal, low_rank


@dataclass(frozen=True, kw_only=True)
class MiSSConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part in this method), and:

    Args:
        r: length of a shard; larger than a LoRA's rank, at half its cost.
        mode: "plain", "mini" (fewer parameters), or "bat" (the update depends on the weight, as in
            Bone).
        mini_r: outputs per repetition in mode "mini"; must divide d_out.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    r: int = 64
    mode: Literal["plain", "bat", "mini"] = "plain"
    mini_r: int = 1
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "MiSSConfig.dropout")
        if self.mini_r < 1:
            raise ConfigError(f"MiSSConfig.mini_r: expected at least 1, found {self.mini_r}")


def param_specs(cfg: MiSSConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_D (r, d_out), (r, mini_r) or (d_out / r, r, r) by mode.

    Raises:
        UnsupportedError: a width isn't divisible by what the mode cuts it into.
    """
    if cfg.mode == "bat":
        for width, what in ((site.d_in, "d_in"), (site.d_out, "d_out")):
            block_diagonal.check_divides("MiSS in mode 'bat'", "r", site.r, width, what)
        return {"lora_D": ParamSpec((site.d_out // site.r, site.r, site.r))}
    if cfg.mode == "mini":
        block_diagonal.check_divides(
            "MiSS in mode 'mini'", "mini_r", cfg.mini_r, site.d_out, "d_out"
        )
        return {"lora_D": ParamSpec((site.r, cfg.mini_r))}
    return {"lora_D": ParamSpec((site.r, site.d_out))}


def _bat(D: Tensor, W: Tensor) -> Tensor:
    """W_oi D_o + D_o, (d_out, d_in)."""
    n, r, _ = D.shape
    blocks = W.view(n, r, -1, r)  # (o, row, i, column)
    return (torch.einsum("oaib,obc->oaic", blocks, D) + D.unsqueeze(2)).flatten(2, 3).flatten(0, 1)


def prepare(cfg: MiSSConfig, p: Params, site: Site, layer: Layer) -> Tensor | None:
    """The dense update in mode "bat"."""
    if cfg.mode != "bat":
        return None
    dtype = torch.promote_types(p["lora_D"].dtype, layer.weight.dtype)
    return _bat(p["lora_D"].to(dtype), layer.weight.to(dtype))


def outputs(
    cfg: MiSSConfig, p: Params, d: Tensor | None, x: Tensor, y: Tensor, site: Site
) -> Tensor:
    """y + S D, or y + x (dense update)^T."""
    D = p["lora_D"]
    x = low_rank.cast(x, D.dtype)
    if d is not None:
        return (y + F.linear(x, d.to(x.dtype))).to(y.dtype)
    S = F.pad(x, (0, -site.d_in % site.r)).unflatten(-1, (-1, site.r)).sum(-2)  # (..., r)
    if cfg.mode == "plain":
        return low_rank.expand(y, S, D.mT)
    return (y.unflatten(-1, (-1, cfg.mini_r)) + (S @ D).unsqueeze(-2)).flatten(-2).to(y.dtype)


def weight(
    cfg: MiSSConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + the repeated D^T, or W + W_oi D_o + D_o."""
    D = p["lora_D"].to(W.dtype)
    if cfg.mode == "bat":
        return W + _bat(D, W), b
    return W + D.mT.repeat(site.d_out // D.shape[1], -(-site.d_in // site.r))[:, : site.d_in], b


def dense(cfg: MiSSConfig, site: Site, tokens: int) -> bool:
    """In mode "bat", whose phases take a dense product of their own."""
    return cfg.mode == "bat"


def scale(cfg: MiSSConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """D times c."""
    return {"lora_D": p["lora_D"] * c}


VARIANT = Variant(
    name="miss",
    good_for="LoRA's size with one trained matrix",
    config=MiSSConfig,
    paper="Kang and Yin 2024, arXiv 2409.15371",
    param_specs=param_specs,
    prepare=prepare,
    outputs=outputs,
    adds=True,
    weight=weight,
    dense=dense,
    scale=scale,
)
