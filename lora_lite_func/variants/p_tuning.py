"""P-tuning: prompt tuning whose virtual tokens a small network makes of others.

    e = relu(relu(t W1^T + b1) W2^T + b2) W3^T + b3                       encoder="mlp"
    e = relu(s W1^T + b1) W2^T + b2,   s (P, 2h) of LSTMs over t          encoder="lstm"
    t lora_tokens (P, width)
    mlp: W1 (h, width), W2 (h, h), W3 (width, h);   lstm: W1 (2h, 2h), W2 (width, 2h)
    LSTM layer i, both directions: lora_xi (2, 4h, width or 2h), lora_hi (2, 4h, h), lora_gi (2, 4h)

The network eases the learning. What it makes is all that a call needs, and all that PEFT's files
hold, so those are read as a plain prompt tuning. Tokens that an LSTM makes depend on each other, so
only prompts of one length stack.

Paper: Liu et al. 2021, arXiv 2103.10385, whose network is the LSTM; later work prefers the other.
(torch's LSTM has two biases, of which this is the sum, and PEFT's may drop out between layers.)
A site, and the identity that there is none of, are as in prompt_tuning.py. alpha has no part in
this method.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import ConfigError
from ..core.method import ParamSpec, Variant
from ..core.random import kaiming, normal, uniform
from ..core.site import Params, Site
from ..kernels.lstm import both_ways


@dataclass(frozen=True, kw_only=True)
class PTuningConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part), and:

    Args:
        r: how many virtual tokens.
        encoder: the network, "mlp" or "lstm".
        hidden: the network's hidden size h; 0 takes the width of the model's tokens.
        lstm_layers: how many layers the LSTM has.
    """

    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: int = 0
    lstm_layers: int = 2

    def validate(self) -> None:
        if self.hidden < 0:
            raise ConfigError(f"PTuningConfig.hidden: expected at least 0, found {self.hidden}")
        if self.lstm_layers < 1:
            raise ConfigError(
                f"PTuningConfig.lstm_layers: expected at least 1, found {self.lstm_layers}"
            )


def param_specs(cfg: PTuningConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_tokens (P, width); lora_Wi and lora_bi of the network's linear layers; lora_xi, lora_hi
    and lora_gi of its LSTM's.
    """
    width, wide = site.d_in, torch.float32
    h, alone = cfg.hidden or width, cfg.encoder == "mlp"
    axis = 0 if alone else None
    specs = {"lora_tokens": ParamSpec((site.r, width), normal(1.0), dtype=wide, rank_axis=axis)}
    linear = ((h, width), (h, h), (width, h)) if alone else ((2 * h, 2 * h), (width, 2 * h))
    for i, (rows, columns) in enumerate(linear, start=1):
        specs[f"lora_W{i}"] = ParamSpec((rows, columns), kaiming, dtype=wide)
        specs[f"lora_b{i}"] = ParamSpec((rows,), dtype=wide)
    return specs if alone else specs | dict(_lstm_specs(cfg, width, h))


def _lstm_specs(cfg: PTuningConfig, width: int, h: int) -> Iterator[tuple[str, ParamSpec]]:
    """The specs of the LSTM's tensors, whose matrices are drawn as torch draws its own."""
    draw, wide = uniform(h**-0.5), torch.float32
    for i in range(1, cfg.lstm_layers + 1):
        columns = width if i == 1 else 2 * h
        yield f"lora_x{i}", ParamSpec((2, 4 * h, columns), draw, dtype=wide)
        yield f"lora_h{i}", ParamSpec((2, 4 * h, h), draw, dtype=wide)
        yield f"lora_g{i}", ParamSpec((2, 4 * h), dtype=wide)


def virtual(cfg: PTuningConfig, p: Params, site: Site) -> Tensor:
    """e (P, width)."""
    h, last = p["lora_tokens"], 3
    if cfg.encoder == "lstm":
        last = 2
        for i in range(1, cfg.lstm_layers + 1):
            h = both_ways(h, p[f"lora_x{i}"], p[f"lora_h{i}"], p[f"lora_g{i}"])
    for i in range(1, last):
        h = torch.relu(F.linear(h, p[f"lora_W{i}"], p[f"lora_b{i}"]))
    return F.linear(h, p[f"lora_W{last}"], p[f"lora_b{last}"])


VARIANT = Variant(
    name="p_tuning",
    good_for="prompts that train more easily",
    config=PTuningConfig,
    paper="Liu et al. 2021, arXiv 2103.10385",
    param_specs=param_specs,
    virtual=virtual,
    sites=("call",),
)
