"""Lily: LoRA whose B is a mixture of matrices that all layers of a kind share, chosen by the input.

    y' = y + s sum_e p_e (x A^T) B_e^T,   p = softmax((x A^T) R^T)
    A (r, d_in) of `stride` layers in a row, B (E, d_out, r) of all layers of a kind, R (E, r);
    s = alpha

Paper: Zhong et al. 2024, arXiv 2407.09946. Layers are of a kind where their paths differ in
numbers alone and their sizes don't. The paper's p is the mean over all tokens of a batch, so that a
sample's output depends on its batch, and decoding by steps differs from one pass; here each token
has its own, unless `gate` says otherwise.
Identity at the start: B = 0. Needs only x and y. It has no dense equivalent: p depends on x.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..core.config import AdapterConfig, by_path, probability, record
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import Layer, ParamSpec, Variant
from ..core.shared import kind_of_layer
from ..core.site import Params, Site
from ..core.statistics import SiteStatistics
from ..core.torch_internals import first_of
from ..kernels import low_rank


@dataclass(frozen=True, kw_only=True)
class LilyConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        r: rank of the update, larger than elsewhere: B is shared.
        alpha: the scale s itself.
        experts: how many matrices B is mixed of, E.
        stride: how many layers of a kind in a row share A.
        gate: which tokens p is a mean over: "token" (each has its own), "row" (those of a row of
            the batch, in one call), "batch" (all, as in the paper and in PEFT).
        groups: {path: (the group that shares A, or "" for a layer's own, the group that shares B)},
            instead of what the kinds of layers give; init fills it in for a stride above 1.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    r: int = 32
    alpha: float = 1.0
    experts: int = 2
    stride: int = record(1)
    gate: Literal["token", "row", "batch"] = "token"
    groups: tuple[tuple[str, tuple[str, str]], ...] = by_path(())
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "LilyConfig.dropout")
        for name in ("experts", "stride"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"LilyConfig.{name}: expected at least 1, found {getattr(self, name)}"
                )


def param_specs(cfg: LilyConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (r, d_in), lora_route (E, r), and lora_B (E, d_out, r) of all layers of a kind."""
    usual = "", kind_of_layer(site)
    of_A, of_B = first_of((groups for path, groups in cfg.groups if path == site.path), usual)
    return {
        "lora_A": ParamSpec((site.r, site.d_in), "kaiming", group=of_A or None),
        "lora_B": ParamSpec((cfg.experts, site.d_out, site.r), group=of_B),
        "lora_route": ParamSpec((cfg.experts, site.r), "kaiming"),
    }


def plan(cfg: LilyConfig, sites: Sequence[Site], seen: Mapping[str, SiteStatistics]) -> LilyConfig:
    """The config with the groups of layers that share A."""
    if cfg.stride == 1:
        return cfg
    found: dict[str, list[str]] = {}
    for site in sites:
        found.setdefault(kind_of_layer(site), []).append(site.path)
    groups = tuple(
        (path, (f"{kind} from {i // cfg.stride * cfg.stride}", kind))
        for kind, paths in found.items()
        for i, path in enumerate(paths)
    )
    return dataclasses.replace(cfg, groups=groups)


def prepare(cfg: LilyConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """The matrices side by side, (d_out, E r)."""
    return p["lora_B"].movedim(-3, -2).flatten(-2)


def _gate(cfg: LilyConfig, p: Params, h: Tensor) -> Tensor:
    """p of each token (..., E), or of those that share it with sizes of 1, of h = x A^T."""
    gate = low_rank.project(h, p["lora_route"]).to(low_rank.core_dtype(h.dtype)).softmax(-1)
    rows = p["lora_A"].ndim - 2  # their axis, behind that of members
    over = range(rows + (cfg.gate == "row"), gate.ndim - 1) if cfg.gate != "token" else ()
    return gate.mean(tuple(over), keepdim=True) if len(over) else gate


def router(cfg: LilyConfig, p: Params, d: Tensor, x: Tensor, site: Site) -> Tensor:
    """p, (..., E)."""
    h = low_rank.project(x, p["lora_A"])
    gate = _gate(cfg, p, h)
    return gate.expand(*h.shape[:-1], gate.shape[-1])


def outputs(cfg: LilyConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + s sum_e p_e (x A^T) B_e^T."""
    h = low_rank.project(x, p["lora_A"])  # (..., r)
    mixed = _gate(cfg, p, h).to(h.dtype).unsqueeze(-1) * h.unsqueeze(-2)  # (..., E, r)
    return low_rank.expand(y, mixed.flatten(-2), d, site.scale)


def scale(cfg: LilyConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """B times c."""
    return {"lora_B": p["lora_B"] * c}


def check_rows(cfg: LilyConfig, by_token: bool) -> None:
    """Refuse rows that wouldn't be what each is alone.

    Raises:
        UnsupportedError: p is a mean over rows, or over tokens that have other adapters.
    """
    if cfg.gate == "batch" or (cfg.gate == "row" and by_token):
        raise UnsupportedError(
            f"lily: with gate={cfg.gate!r} the change of a token depends on others, which may have "
            f"other adapters here; give gate='token'"
            + ("" if by_token else " or 'row'")
            + ", or call the model once for each adapter"
        )


VARIANT = Variant(
    name="lily",
    good_for="strong updates from few parameters",
    config=LilyConfig,
    paper="Zhong et al. 2024, arXiv 2407.09946",
    param_specs=param_specs,
    prepare=prepare,
    outputs=outputs,
    router=router,
    scale=scale,
    scaling=lambda cfg, site: site.alpha,
    batched=True,
    adds=True,
    plan=plan,
    check_rows=check_rows,
)
