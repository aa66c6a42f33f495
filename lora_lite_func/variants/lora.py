"""LoRA: a trainable low-rank update beside the frozen weight.

    y' = y + s (x A^T) B^T        s = alpha / r   (rsLoRA: alpha / sqrt(r))
    A (r, d_in), B (d_out, r)

Papers: Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732;
LoRA-FA: Zhang et al. 2023, arXiv 2308.03303.
Identity at the start: B = 0 (orthogonal init: B A = 0 with both factors non-zero). Needs only x and
y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.config import AdapterConfig, added, probability, record
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import MATRICES, ParamSpec, Variant
from ..core.random import kaiming, normal
from ..core.site import Site
from . import _pair


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
        init_A: "kaiming" (uniform in +-1/sqrt(d_in)), "gaussian" (std 1/r), or "orthogonal" (even
            r; both factors start non-zero with B A = 0).
        frozen_A: leave lora_A at its random start and train lora_B alone (LoRA-FA, Zhang et al.
            2023, arXiv 2308.03303): x A^T is kept for the backward pass, and not x. Its correction
            of gradients is `ll.precondition(grads, params, "lora_fa")`.
        invocation_tokens: the adapter is for the tokens from the last occurrence of this sequence
            of ids on (activated LoRA, Greenewald et al. 2025, arXiv 2504.12397), so it is taken
            as `ll.activated(params, ll.invoked(input_ids, invocation_tokens))` alone, and isn't
            merged. Empty for an adapter of all tokens.
    """

    rslora: bool = False
    dropout: float = 0.0
    init_A: Literal["kaiming", "gaussian", "orthogonal"] = record("kaiming")
    frozen_A: bool = added(False)
    invocation_tokens: tuple[int, ...] = added(())

    def validate(self) -> None:
        probability(self.dropout, "LoRAConfig.dropout")
        odd = next((i for i in self.invocation_tokens if type(i) is not int or i < 0), None)
        if odd is not None:
            raise ConfigError(
                f"LoRAConfig.invocation_tokens: expected token ids of at least 0, found {odd!r}"
            )
        ranks = [self.r, *(r for _, r in self.rank_pattern)]
        if self.init_A == "orthogonal" and any(r % 2 for r in ranks):
            raise ConfigError(
                f"LoRAConfig.init_A: 'orthogonal' splits the directions in two halves, expected "
                f"an even r, found {ranks}"
            )


def param_specs(cfg: LoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (r, d_in), lora_B (d_out, r). On an embedding A starts at zero and B at random: rows
    of ids never seen stay the base's.

    Raises:
        UnsupportedError: frozen_A on an embedding, whose A would stay zero.
    """
    if site.kind == "embedding" and cfg.init_A != "orthogonal":
        if cfg.frozen_A:
            raise UnsupportedError(
                "LoRAConfig.frozen_A: on an embedding lora_A starts at zero, and frozen there it "
                "would leave nothing to train; adapt it with another config, or "
                "init_A='orthogonal'"
            )
        return {
            "lora_A": ParamSpec((site.r, site.d_in), rank_axis=0),
            "lora_B": ParamSpec((site.d_out, site.r), normal(1.0), rank_axis=1),
        }
    start = normal(1.0 / site.r) if cfg.init_A == "gaussian" else kaiming
    return {
        "lora_A": ParamSpec((site.r, site.d_in), start, not cfg.frozen_A, rank_axis=0),
        "lora_B": ParamSpec((site.d_out, site.r), rank_axis=1),
    }


def init(
    cfg: LoRAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The orthogonal start; the others are in the specs."""
    if cfg.init_A != "orthogonal":
        return {}
    draw = generator("lora_A")
    square = torch.randn(site.r, site.r, generator=draw, dtype=torch.float64)
    Q = torch.linalg.qr(square)[0]  # (r, r), orthogonal rows
    left = torch.randn(site.d_out, site.r // 2, generator=generator("lora_B"), dtype=torch.float64)
    right = torch.randn(site.r // 2, site.d_in, generator=draw, dtype=torch.float64)
    # B A = left (Q_odd Q_even^T) right = 0
    return {"lora_A": Q[::2].mT @ right / 10.0, "lora_B": left @ Q[1::2] / 10.0}


def scaling(cfg: LoRAConfig, site: Site) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    return site.alpha / (math.sqrt(site.r) if cfg.rslora else site.r)


VARIANT = Variant(
    name="lora",
    good_for="the default: cheap, mergeable, served everywhere",
    config=LoRAConfig,
    paper="Hu et al. 2021, arXiv 2106.09685",
    param_specs=param_specs,
    init=init,
    outputs=_pair.outputs,
    weight=_pair.weight,
    additive=True,
    scale=_pair.scale,
    low_rank_factors=_pair.low_rank_factors,
    called_outputs=_pair.called_outputs,
    scaling=scaling,
    batched=True,
    sites=(*MATRICES, "embedding"),
)
