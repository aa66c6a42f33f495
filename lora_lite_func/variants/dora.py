"""DoRA: the direction of each weight row gets a low-rank update, its magnitude is learned apart.

    y' = (m / n) * (y - b + s (x A^T) B^T) + b        m (d_out,)
    V = W + s B A,   n_i = |V_i| (row norms)

Paper: Liu et al. 2024, arXiv 2402.09353. The norm n is a constant for the gradient (section 4.3),
unless `detach_norm=False`. Its square comes without a d_out x d_in temporary:

    n_i^2 = |W_i|^2 + 2 s <(W A^T)_i, B_i> + s^2 B_i (A A^T) B_i^T

W A^T is r rows through the frozen layer, so a quantised layer serves as it is. W is the weight in
the call: with other adapters in, another base's, or what the model was given since the start. So
|W_i|^2 is found in each call, by one read of the weight. Where the weight isn't dense or at hand
(quantised, offloaded), it is that of the start, which is kept.
Identity at the start: B = 0 and m = |W_i|, so m / n is exactly 1.
With dropout only the low-rank branch sees the dropped x. (PEFT recomputes the whole product to drop
the other term too.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.errors import UnsupportedError
from ..core.method import MATRICES, Layer, ParamSpec, Variant
from ..core.phase_functions import Map
from ..core.random import kaiming
from ..core.site import Params, Site
from ..kernels import low_rank

_ROUNDING = 32
"""Sums of d_in squares that differ by so many units in the last place are the same sum."""


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        dropout: probability of dropping an entry of the branch's input, in training mode only.
        detach_norm: treat the row norm as a constant in gradients (the paper's choice).
    """

    dropout: float = 0.0
    detach_norm: bool = True

    def validate(self) -> None:
        probability(self.dropout, "DoRAConfig.dropout")


class Prepared(NamedTuple):
    """gain = m / n (d_out,); shift = (1 - gain) b or None (d_out,); B times gain (d_out, r)."""

    gain: Tensor
    shift: Tensor | None
    B: Tensor


def param_specs(cfg: DoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A, lora_B, magnitudes lora_m (d_out,), frozen squared row norms lora_wnorm2 (d_out,)."""
    return {
        "lora_A": ParamSpec((site.r, site.d_in), kaiming, rank_axis=0),
        "lora_B": ParamSpec((site.d_out, site.r), rank_axis=1),
        "lora_m": ParamSpec((site.d_out,), dtype=torch.float32),
        "lora_wnorm2": ParamSpec((site.d_out,), trainable=False, dtype=torch.float32),
    }


def init(
    cfg: DoRAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """Row norms of W."""
    stored_as = low_rank.core_dtype(cfg.dtype or weight.dtype)
    wnorm2 = weight.square().sum(dim=1).to(stored_as)  # (d_out,)
    return {"lora_m": wnorm2.sqrt(), "lora_wnorm2": wnorm2}


def _gain(p: Params, n2: Tensor, wnorm2: Tensor) -> Tensor:
    """m / n (d_out,), of n^2 and |W_i|^2; an n^2 that is lost in the rounding of |W_i|^2 counts as
    that rounding.
    """
    finfo = torch.finfo(n2.dtype)
    least = (finfo.eps * wnorm2.detach()).clamp_min(finfo.tiny)
    return p["lora_m"].to(n2.dtype) / torch.maximum(n2, least).sqrt()


def _as_stored(cfg: DoRAConfig, stored: Tensor, found: Tensor) -> Tensor:
    """Squared row norms `found` (d_out,), exactly the stored ones where they differ by rounding
    alone: at the start m / n is then exactly 1, in whatever order they were summed.
    """
    close = (found - stored).abs() <= _ROUNDING * torch.finfo(found.dtype).eps * stored
    if not cfg.detach_norm:
        stored = stored + (found - found.detach())  # differentiable either way
    return torch.where(close, stored, found)


def _row_norms(cfg: DoRAConfig, p: Params, layer: Layer, core: torch.dtype) -> Tensor:
    """|W_i|^2 (d_out,) of the layer underneath as it is now; the stored ones where that has no
    dense weight at hand and is the base's own.
    """
    stored = p["lora_wnorm2"].to(core)
    if not (layer.is_plain or layer.is_changed):
        return stored
    W = layer.current_weight()
    if W.itemsize == 1:
        W = W.to(core)  # float8 has no products and no common type with others
    found = torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, core))
    return _as_stored(cfg, stored, found.to(core).square())


def prepare(cfg: DoRAConfig, p: Params, site: Site, layer: Layer) -> Prepared:
    """m / n and what follows from it."""
    core, s = low_rank.core_dtype(p["lora_m"].dtype), site.scale
    A, B, wnorm2 = p["lora_A"], p["lora_B"], _row_norms(cfg, p, layer, core)
    if cfg.detach_norm:
        A, B, wnorm2 = A.detach(), B.detach(), wnorm2.detach()
    WA = layer.linear(A).to(core).mT  # (d_out, r)
    if cfg.detach_norm:
        WA = WA.detach()
    A, B = A.to(core), B.to(core)
    half = torch.addmm(WA, B, A @ A.mT * (0.5 * s))  # (d_out, r)
    # |W_i|^2 + 2 s W_i (B A)_i^T + s^2 |(B A)_i|^2
    gain = _gain(p, wnorm2 + 2.0 * s * (half * B).sum(dim=1), wnorm2)
    bias = layer.bias
    shift = None if bias is None else (1.0 - gain) * bias
    return Prepared(gain, shift, (p["lora_B"] * gain[:, None]).to(p["lora_B"].dtype))


def outputs(cfg: DoRAConfig, p: Params, d: Prepared, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """(m / n) (y - b + s (x A^T) B^T) + b."""
    return low_rank.add(_scaled(d, y), x, p["lora_A"], d.B, site.scale)


def _scaled(d: Prepared, y: Tensor) -> Tensor:
    """(m / n) (y - b) + b, in y's dtype."""
    scaled = y * d.gain if d.shift is None else torch.addcmul(d.shift, y, d.gain)
    return scaled.to(y.dtype)


def check_calls(cfg: DoRAConfig) -> None:
    """Refuse a norm whose gradient reaches A and B beside their calls.

    Raises:
        UnsupportedError: detach_norm is False.
    """
    if not cfg.detach_norm:
        raise UnsupportedError(
            "DoRAConfig.detach_norm=False: gradients reach A and B through the row norms too, "
            "outside of their calls; take detach_norm=True"
        )


def called_outputs(
    cfg: DoRAConfig, p: Params, d: Prepared, x: Tensor, y: Tensor, site: Site, A: Map, B: Map
) -> Tensor:
    """(m / n) (y - b + s B(A(x))) + b."""
    return low_rank.add_called(_scaled(d, y), x, A, B, d.gain * site.scale)


def weight(
    cfg: DoRAConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """diag(m / n) (W + s B A)."""
    core = low_rank.core_dtype(p["lora_m"].dtype)
    V = low_rank.add_dense(W, p["lora_A"], p["lora_B"], site.scale)
    whole = V.detach() if cfg.detach_norm else V
    stored = p["lora_wnorm2"].to(core)
    n2 = _as_stored(cfg, stored, torch.linalg.vector_norm(whole, dim=1).to(core).square())
    return _gain(p, n2, stored)[:, None].to(W.dtype) * V, b


def scale(cfg: DoRAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """B times c, m moved along its line from |W_i|."""
    start = p["lora_wnorm2"].sqrt()
    return {**p, "lora_B": p["lora_B"] * c, "lora_m": start + c * (p["lora_m"] - start)}


VARIANT = Variant(
    name="dora",
    good_for="small ranks that should do more",
    config=DoRAConfig,
    paper="Liu et al. 2024, arXiv 2402.09353",
    param_specs=param_specs,
    init=init,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    scale=scale,
    called_outputs=called_outputs,
    check_calls=check_calls,
    needs=frozenset({"weight"}),
    sites=(*MATRICES, "embedding"),
)
