"""Prefix tuning: virtual keys and values in front of a model's own, learned in each layer.

    K' = [k, K]    V' = [v, V]        k, v (P, heads * head size), a pair of its own in each layer
    lora_prefix (layers, 2, P, heads * head size);   or made of tokens, as it is learned then:
    tanh(lora_tokens W1^T + b1) W2^T + b2            lora_tokens (P, w), W1 (h, w)

A site is the whole call of a model with a key-value cache: they are put into the cache before the
first tokens are, whose positions count them. Keys are as the cache has them, so no rotation is
applied to them. Of a model that encodes and decodes it is the decoder's own attention. In layers
with a sliding window they slide out of it as the tokens would, padding behind them counted.

Paper: Li and Liang 2021, arXiv 2101.00190. Its second form eases the learning.
Identity at the start: none; a key of zeros still takes a part of attention. So there is no strength
to scale, and no weight to merge into. alpha has no part in this method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import ConfigError
from ..core.method import ParamSpec, Variant
from ..core.random import kaiming, normal
from ..core.site import Params, Site


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part), and:

    Args:
        r: how many virtual tokens have keys and values.
        projection: hidden size of the network that makes them of tokens; 0 learns them themselves.
    """

    projection: int = 0

    def validate(self) -> None:
        if self.projection < 0:
            raise ConfigError(
                f"PrefixTuningConfig.projection: expected at least 0, found {self.projection}"
            )


def param_specs(cfg: PrefixTuningConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_prefix (layers, 2, P, w); with a projection lora_tokens (P, w), lora_W1 (h, w),
    lora_b1 (h,), lora_W2 (layers * 2 * w, h), lora_b2.
    """
    layers, width, wide = site.d_in, site.d_out, torch.float32
    if not cfg.projection:
        shape = (layers, 2, site.r, width)
        return {"lora_prefix": ParamSpec(shape, normal(1.0), dtype=wide, rank_axis=2)}
    h, out = cfg.projection, layers * 2 * width
    return {
        "lora_tokens": ParamSpec((site.r, width), normal(1.0), dtype=wide, rank_axis=0),
        "lora_W1": ParamSpec((h, width), kaiming, dtype=wide),
        "lora_b1": ParamSpec((h,), dtype=wide),
        "lora_W2": ParamSpec((out, h), kaiming, dtype=wide),
        "lora_b2": ParamSpec((out,), dtype=wide),
    }


def virtual(cfg: PrefixTuningConfig, p: Params, site: Site) -> Tensor:
    """Keys and values (layers, 2, P, w)."""
    if "lora_prefix" in p:
        return p["lora_prefix"]
    h = torch.tanh(F.linear(p["lora_tokens"], p["lora_W1"], p["lora_b1"]))
    made = F.linear(h, p["lora_W2"], p["lora_b2"])  # (P, layers * 2 * w)
    return made.unflatten(-1, (site.d_in, 2, site.d_out)).permute(1, 2, 0, 3)


VARIANT = Variant(
    name="prefix_tuning",
    good_for="prompts inside every attention layer",
    config=PrefixTuningConfig,
    paper="Li and Liang 2021, arXiv 2101.00190",
    param_specs=param_specs,
    virtual=virtual,
    sites=("cache",),
)
