"""EVA: LoRA whose A starts at the directions in which the layer's inputs vary most.

    y' = y + s (x A^T) B^T        A (r, d_in), B (d_out, r), s = alpha / r   (rsLoRA: alpha / sqrt(r))
    X = U S V^T, the calibration inputs:   A = V_r^T   (whiten: each row over the root of its mean square, so that x A^T has unit size)

Paper: Paischer et al. 2024, arXiv 2410.07170 (there ranks are also shared out anew among the layers; here each keeps its own).
Identity at the start: B = 0. Needs the second moment of the inputs, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import AdapterConfig, probability, record
from ..errors import UnsupportedError
from ..spec import Params, ParamSpec, Site, Variant
from . import _calibrated, _lowrank


@dataclass(frozen=True, kw_only=True)
class EVAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
        center: take the mean out of the inputs first; else a strong mean is the first direction.
        whiten: divide each direction by the size of the inputs along it.
    """

    rslora: bool = False
    dropout: float = 0.0
    center: bool = record(False)
    whiten: bool = record(False)

    def validate(self) -> None:
        probability(self.dropout, "EVAConfig.dropout")


def param_specs(cfg: EVAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (r, d_in), lora_B (d_out, r).

    Raises:
        UnsupportedError: more directions than input features.
    """
    if site.r > site.d_in:
        raise UnsupportedError(f"EVA finds directions in {site.d_in} input features, expected a rank of at most that, found r={site.r}")
    return {"lora_A": ParamSpec((site.r, site.d_in), rank_axis=0), "lora_B": ParamSpec((site.d_out, site.r), rank_axis=1)}


def init(
    cfg: EVAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: _calibrated.Seen,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The top r eigenvectors of the second moment, each with its largest entry positive."""
    _calibrated.check_tokens(stats, site.r, "EVA")
    C = _calibrated.wide(stats.second)  # (d_in, d_in)
    if cfg.center:
        mean = _calibrated.wide(stats.mean)
        C = C - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(C)  # ascending
    A = vectors[:, -site.r :].flip(1).mT  # (r, d_in)
    A = A * A.gather(1, A.abs().argmax(1, keepdim=True)).sign()
    if cfg.whiten:
        sizes = values[-site.r :].flip(0)  # (r,), mean squares of the inputs along each row
        A = A / sizes.clamp_min(torch.finfo(torch.float32).eps * sizes[0]).sqrt()[:, None]
    return {"lora_A": A}


def outputs(cfg: EVAConfig, p: Params, d: None, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + s (x A^T) B^T."""
    return _lowrank.add(y, x, p["lora_A"], p["lora_B"], site.scale)


def weight(cfg: EVAConfig, p: Params, site: Site, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W + s B A."""
    return _lowrank.add_dense(W, p["lora_A"], p["lora_B"], site.scale), b


def scale(cfg: EVAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """B times c."""
    return {**p, "lora_B": p["lora_B"] * c}


def factor(cfg: EVAConfig, site: Site) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    return site.alpha / (site.r**0.5 if cfg.rslora else site.r)


VARIANT = Variant(
    name="eva",
    config=EVAConfig,
    paper="Paischer et al. 2024, arXiv 2410.07170",
    param_specs=param_specs,
    init=init,
    outputs=outputs,
    weight=weight,
    scale=scale,
    factor=factor,
    leading=True,
    needs=frozenset({"inputs"}),
)
