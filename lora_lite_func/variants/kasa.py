"""KaSA: the weight loses its minor singular directions, beside a low-rank update with values.

    y' = y + s ((x A^T) * d) B^T - (x A_-^T) B_-^T        s = alpha / r
    A (r, d_in), B (d_out, r), d (r,)
    W = U S V^T, its r smallest values:  lora_drop_A A_- = V_-^T, lora_drop_B B_- = U_- S_-, frozen

Paper: Wang et al. 2024, arXiv 2412.06071. There W is rewritten for good; here the minor directions
are subtracted in the call, so W stays as it is and strength 0 is the base. Both parts are one
product of rank 2r. The paper's loss has beta |d|^2 + gamma (|B^T B - I| + |A A^T - I|) in
addition, which is `ll.penalty`.
The start is not the identity, by design: the minor directions are missing. B = 0, so nothing else
is changed. Needs W once, for the decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, record
from ..core.errors import ConfigError
from ..core.method import MATRICES, ParamSpec, Variant
from ..core.phase_functions import Map
from ..core.random import kaiming, normal
from ..core.site import Params, Site
from ..kernels import low_rank
from ._made_pair import Pair, in_dtype, made_pair


@dataclass(frozen=True, kw_only=True)
class KaSAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and these. It has no dropout, which would put the minor
    directions back at random.

    Args:
        beta: weight of |d|^2 in `ll.penalty`.
        gamma: weight in it of the distances of B^T B and A A^T from the identity.
    """

    beta: float = record(1e-4)
    gamma: float = record(1e-3)

    def validate(self) -> None:
        for name in ("beta", "gamma"):
            value = getattr(self, name)
            if value < 0.0:
                raise ConfigError(f"KaSAConfig.{name}: expected at least 0, found {value}")


def param_specs(cfg: KaSAConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_A (r, d_in), lora_B (d_out, r), lora_d (r,); frozen lora_drop_A, lora_drop_B.

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "KaSA")
    a, b = (site.r, site.d_in), (site.d_out, site.r)
    return {
        "lora_A": ParamSpec(a, kaiming),
        "lora_B": ParamSpec(b),
        "lora_d": ParamSpec((site.r,), normal(1.0), dtype=torch.float32),
        "lora_drop_A": ParamSpec(a, trainable=False),
        "lora_drop_B": ParamSpec(b, trainable=False),
    }


def init(
    cfg: KaSAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """What the weight loses: its bottom r singular triplets."""
    U, S, Vh = low_rank.bottom_svd(weight, site.r)
    return {"lora_drop_A": Vh, "lora_drop_B": U * S}


def _factors(cfg: KaSAConfig, p: Params, site: Site, dtype: torch.dtype | None) -> Pair:
    """s B diag(d) A - B_- A_- as one factor pair, (2r, d_in) and (d_out, 2r)."""
    p = in_dtype(p, dtype)
    A, B = p["lora_A"], p["lora_B"]
    valued = (B * p["lora_d"] * site.scale).to(B.dtype)
    return torch.cat([A, p["lora_drop_A"]]), torch.cat([valued, -p["lora_drop_B"]], dim=1)


_PHASES = made_pair(_factors, scaled=False)


def called_outputs(
    cfg: KaSAConfig,
    p: Params,
    d: tuple[Tensor, Tensor],
    x: Tensor,
    y: Tensor,
    site: Site,
    A: Map,
    B: Map,
) -> Tensor:
    """y + s B(d * A(x)) - B_- A_- x."""
    y = low_rank.add(y, x, p["lora_drop_A"], p["lora_drop_B"], -1.0)
    return low_rank.add_called(y, x, A, B, site.scale, p["lora_d"])


def scale(cfg: KaSAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """Both parts times c."""
    return {**p, "lora_B": p["lora_B"] * c, "lora_drop_B": p["lora_drop_B"] * c}


def penalty(cfg: KaSAConfig, p: Params, site: Site) -> Tensor:
    """beta |d|^2 + gamma (|B^T B - I| + |A A^T - I|), Frobenius, float32 at least."""
    core = low_rank.core_dtype(p["lora_A"].dtype)
    A, B, d = (p[f"lora_{name}"].to(core) for name in ("A", "B", "d"))
    eye = torch.eye(site.r, dtype=core, device=A.device)
    apart = (B.mT @ B - eye).norm() + (A @ A.mT - eye).norm()
    return cfg.beta * d.square().sum() + cfg.gamma * apart


VARIANT = Variant(
    name="kasa",
    good_for="dropping what is noise in weights",
    config=KaSAConfig,
    paper="Wang et al. 2024, arXiv 2412.06071",
    param_specs=param_specs,
    init=init,
    prepare=_PHASES.prepare,
    outputs=_PHASES.outputs,
    weight=_PHASES.weight,
    additive=True,
    scale=scale,
    penalty=penalty,
    low_rank_factors=_PHASES.low_rank_factors,
    called_outputs=called_outputs,
    needs=frozenset({"weight"}),
    sites=(*MATRICES, "embedding"),
)
