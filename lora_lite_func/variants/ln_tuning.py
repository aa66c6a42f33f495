"""LN-tuning: the gain of a norm is trained, and its bias where it has one.

    w' = w + dw,   b' = b + db        dw lora_ln_w (n,), db lora_ln_b (n,)

Paper: Zhao et al. 2023, Tuning LayerNorm in Attention, arXiv 2312.11420. The gradients of the
change are those of w, and the base's gain stays where it is. Norms that multiply by 1 + w are no
different. An RMSNorm has no bias, so none is trained.
Identity at the start: dw = db = 0. Needs nothing. r and alpha have no part in this method.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.config import AdapterConfig
from ..core.method import ParamSpec, Variant
from ..core.site import Params, Site


@dataclass(frozen=True, kw_only=True)
class LNTuningConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r and alpha have no part in this method; without
    target_names every norm is a site).
    """


def param_specs(cfg: LNTuningConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_ln_w (n,), and lora_ln_b (n,) where the norm has a bias."""
    specs = {"lora_ln_w": ParamSpec((site.d_out,))}
    return specs | {"lora_ln_b": ParamSpec((site.d_out,))} if site.bias else specs


def weight(
    cfg: LNTuningConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """w + dw as a column (n, 1), b + db."""
    gain = W + p["lora_ln_w"].to(W.dtype)[:, None]
    return gain, None if b is None else b + p["lora_ln_b"].to(b.dtype)


def scale(cfg: LNTuningConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """dw and db times c."""
    return {name: t * c for name, t in p.items()}


VARIANT = Variant(
    name="ln_tuning",
    good_for="norms alone: few, useful numbers",
    config=LNTuningConfig,
    paper="Zhao et al. 2023, arXiv 2312.11420",
    param_specs=param_specs,
    weight=weight,
    scale=scale,
    sites=("norm",),
)
