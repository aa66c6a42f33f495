"""LLaMA-Adapter: attention looks at a learned prompt too, through a gate that starts shut.

    y' = y + g softmax(q (a Wk^T)^T / sqrt(head size)) (a Wv^T)        before the output projection
    a lora_prompt (P, d),  g lora_gate ();  Wk, Wv the layer's own, grouped as its keys are

The queries are those that the layer's own attention takes, rotated where it rotates; the prompt's
keys have no place, so they aren't. A site is an attention module of transformers; its paper adapts
the topmost ones alone (`layers=range(-30, 0)`).

Paper: Zhang et al. 2023, arXiv 2303.16199.
Identity at the start: g = 0. It needs the queries. alpha has no part in this method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.method import ParamSpec, Variant
from ..core.random import normal
from ..core.site import Params, Site
from ..kernels import low_rank


@dataclass(frozen=True, kw_only=True)
class LLaMAAdapterConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part), and:

    Args:
        r: how many tokens the prompt of a layer has.
    """


def param_specs(cfg: LLaMAAdapterConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_prompt (P, d), lora_gate ()."""
    return {
        "lora_prompt": ParamSpec((site.r, site.d_in), normal(1.0)),
        "lora_gate": ParamSpec((), dtype=torch.float32),
    }


def attend(
    cfg: LLaMAAdapterConfig,
    p: Params,
    keys: Callable[[Tensor], tuple[Tensor, Tensor]],
    q: Tensor,
    scaling: float,
    y: Tensor,
    site: Site,
) -> Tensor:
    """y (N, T, heads, size) and what the queries q (N, heads, T, size) find in the prompt."""
    k, v = keys(p["lora_prompt"])  # (..., heads, P, size)
    core = low_rank.core_dtype(torch.promote_types(q.dtype, p["lora_gate"].dtype))
    seen = torch.softmax(q.to(core) @ k.to(core).mT * scaling, dim=-1)
    found = (p["lora_gate"][..., None, None, None] * seen) @ v.to(core)
    return y + found.transpose(1, 2).to(y.dtype)


def scale(cfg: LLaMAAdapterConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """g times c."""
    return {"lora_gate": p["lora_gate"] * c}


VARIANT = Variant(
    name="llama_adapter",
    config=LLaMAAdapterConfig,
    paper="Zhang et al. 2023, arXiv 2303.16199",
    good_for="prompts that start as the base",
    param_specs=param_specs,
    attend=attend,
    scale=scale,
    batched=True,
    sites=("attention",),
)
