"""ROAD: pairs of output features are rotated and scaled, bias included.

    (y1', y2') = ( f1 y1 - s1 y2,  s2 y1 + f2 y2 )      f = a cos(theta), s = a sin(theta)

In a group of G features, j is paired with j + G/2.
road_1: one (theta, a) per pair.   road_2: one per feature.
road_4: one per entry of the 2 x 2 block, laid out (groups, 2, G), [0] for the cosine's column and
[1] for the sine's.
Paper: Petrushkov et al. 2024, arXiv 2409.00119 (which pairs neighbours; a permutation of this).
Identity at the start: theta = 0, a = 1, so f = 1 and s = 0 exactly. Needs only y. r and alpha have
no part in this method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import MATRICES, Layer, ParamSpec, Variant
from ..core.site import Params, Site
from ..kernels import low_rank


@dataclass(frozen=True, kw_only=True)
class ROADConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r and alpha have no part in this method), and:

    Args:
        mode: "road_1", "road_2" or "road_4": how many angles and magnitudes a pair has.
        group_size: even; features are paired within groups of this size. It only permutes the
            pairs.
    """

    mode: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64

    def validate(self) -> None:
        if self.group_size < 2 or self.group_size % 2:
            raise ConfigError(
                f"ROADConfig.group_size: expected an even number, found {self.group_size}"
            )


def param_specs(cfg: ROADConfig, site: Site) -> dict[str, ParamSpec]:
    """Angles and magnitudes, (d_out / 2,), (d_out,) or (2 d_out,) by mode.

    Raises:
        UnsupportedError: d_out isn't divisible by the group size.
    """
    if site.d_out % cfg.group_size:
        fitting = [g for g in range(2, min(site.d_out, 256) + 1, 2) if site.d_out % g == 0]
        raise UnsupportedError(
            f"ROAD pairs features in groups, expected d_out divisible by "
            f"group_size={cfg.group_size}, found d_out={site.d_out}; "
            + (
                f"group_size={max(fitting)} fits"
                if fitting
                else "an odd d_out can't be paired: leave it out with exclude_names"
            )
        )
    count = {"road_1": site.d_out // 2, "road_2": site.d_out, "road_4": 2 * site.d_out}[cfg.mode]
    return {
        "lora_road_theta": ParamSpec((count,), dtype=torch.float32),
        "lora_road_alpha": ParamSpec((count,), "ones", dtype=torch.float32),
    }


def _columns(cfg: ROADConfig, p: Params) -> tuple[Tensor, Tensor]:
    """The factors of y and of its quarter turn, (d_out,) each."""
    theta, a = p["lora_road_theta"], p["lora_road_alpha"]
    f, s = a * theta.cos(), a * theta.sin()
    if cfg.mode == "road_1":
        pairs = (-1, 1, cfg.group_size // 2)
        return f.view(pairs).expand(-1, 2, -1).flatten(), s.view(pairs).expand(-1, 2, -1).flatten()
    if cfg.mode == "road_4":
        entries = (-1, 2, cfg.group_size)
        return f.view(entries)[:, 0].flatten(), s.view(entries)[:, 1].flatten()
    return f, s


def _turn(y: Tensor, f: Tensor, s: Tensor, group: int) -> Tensor:
    """f * y + s * (-y2, y1), features last."""
    y1, y2 = y.unflatten(-1, (-1, 2, group // 2)).unbind(-2)  # (..., groups, G/2) each
    quarter = torch.stack([-y2, y1], dim=-2).flatten(-3)  # (..., d_out)
    return torch.addcmul(y * f, quarter, s).to(y.dtype)


def prepare(cfg: ROADConfig, p: Params, site: Site, layer: Layer) -> tuple[Tensor, Tensor]:
    """The two columns of factors, (d_out,) each."""
    return _columns(cfg, p)


def outputs(
    cfg: ROADConfig, p: Params, d: tuple[Tensor, Tensor], x: Tensor, y: Tensor, site: Site
) -> Tensor:
    """R y."""
    return _turn(y, *d, cfg.group_size)


def weight(
    cfg: ROADConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """R W, R b."""
    core = low_rank.core_dtype(W.dtype)
    f, s = (c.to(core) for c in _columns(cfg, p))
    turned = _turn(W.mT, f, s, cfg.group_size).mT
    return turned, None if b is None else _turn(b, f, s, cfg.group_size)


def scale(cfg: ROADConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """Angles times c, magnitudes moved along their line from 1."""
    return {
        "lora_road_theta": p["lora_road_theta"] * c,
        "lora_road_alpha": 1.0 + c * (p["lora_road_alpha"] - 1.0),
    }


VARIANT = Variant(
    name="road",
    good_for="cheapest rows, one adapter per request",
    config=ROADConfig,
    paper="Petrushkov et al. 2024, arXiv 2409.00119",
    param_specs=param_specs,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    scale=scale,
    sites=(*MATRICES, "embedding"),
)
