"""A method from outside the package: what it takes to add one. It is held to every law by its row
in cases.py.
"""

from dataclasses import dataclass

import torch

import lora_lite_func as ll


@dataclass(frozen=True, kw_only=True)
class MixConfig(ll.AdapterConfig):
    """y' = y + s c (v . x): one learned direction in, one out."""


def specs(cfg, site):
    if min(site.d_in, site.d_out) < 2:
        raise ll.UnsupportedError(
            f"a direction needs two features, found {site.d_in} -> {site.d_out}; use exclude_names"
        )
    start = lambda shape, gen: torch.randn(shape, generator=gen, dtype=torch.float32, device="cpu")  # noqa: E731
    return {"lora_v": ll.ParamSpec((site.d_in,), start), "lora_c": ll.ParamSpec((site.d_out,))}


def outputs(cfg, p, d, x, y, site):
    return y + site.scale * (x @ p["lora_v"].to(x.dtype))[..., None] * p["lora_c"].to(y.dtype)


def weight(cfg, p, site, W, b):
    return W + site.scale * torch.outer(p["lora_c"], p["lora_v"]).to(W.dtype), b


MIX = ll.register(
    ll.Variant(
        name="mix",
        config=MixConfig,
        param_specs=specs,
        outputs=outputs,
        weight=weight,
        scale=lambda cfg, p, c: {**p, "lora_c": c * p["lora_c"]},
    )
)
