"""P-tuning: prompt tuning whose virtual tokens a small network makes of others.

    e = relu(relu(t W1^T + b1) W2^T + b2) W3^T + b3
    t lora_tokens (P, width);  W1 (h, width), W2 (h, h), W3 (width, h), and their biases

The network eases the learning. What it makes is all that a call needs, and all that PEFT's files
hold, so those are read as a plain prompt tuning.

Paper: Liu et al. 2021, arXiv 2103.10385, with the network that later work prefers to its LSTM.
A site, and the identity that there is none of, are as in prompt_tuning.py. alpha has no part in
this method.
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
class PTuningConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part), and:

    Args:
        r: how many virtual tokens.
        hidden: the network's hidden size h; 0 takes the width of the model's tokens.
    """

    hidden: int = 0

    def validate(self) -> None:
        if self.hidden < 0:
            raise ConfigError(f"PTuningConfig.hidden: expected at least 0, found {self.hidden}")


def param_specs(cfg: PTuningConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_tokens (P, width); lora_W1 (h, width), lora_W2 (h, h), lora_W3 (width, h); lora_b1,
    lora_b2 (h,), lora_b3 (width,).
    """
    width, wide = site.d_in, torch.float32
    h = cfg.hidden or width
    specs = {"lora_tokens": ParamSpec((site.r, width), normal(1.0), dtype=wide, rank_axis=0)}
    for i, (rows, columns) in enumerate(((h, width), (h, h), (width, h)), start=1):
        specs[f"lora_W{i}"] = ParamSpec((rows, columns), kaiming, dtype=wide)
        specs[f"lora_b{i}"] = ParamSpec((rows,), dtype=wide)
    return specs


def virtual(cfg: PTuningConfig, p: Params, site: Site) -> Tensor:
    """e (P, width)."""
    h = torch.relu(F.linear(p["lora_tokens"], p["lora_W1"], p["lora_b1"]))
    h = torch.relu(F.linear(h, p["lora_W2"], p["lora_b2"]))
    return F.linear(h, p["lora_W3"], p["lora_b3"])


VARIANT = Variant(
    name="p_tuning",
    good_for="prompts that train more easily",
    config=PTuningConfig,
    paper="Liu et al. 2021, arXiv 2103.10385",
    param_specs=param_specs,
    virtual=virtual,
    sites=("call",),
)
