"""LoKr: the update is a Kronecker product of a small matrix and a larger one of low rank.

    W' = W + s W1 (x) W2      W1 (l, m), W2 (k, n), d_out = l k, d_in = m n
                              W2 = W2a W2b of rank r where r < max(k, n) / 2, else full
    s = alpha / r, or 1 where neither factor is of low rank
    vec trick:  X = x.view(m, n),   y' = y + s (W1 X W2^T).view(d_out)

Papers: LyCORIS, Yeh et al. 2023, arXiv 2309.14859; the Kronecker adapter is KronA, Edalati et al.
2022, arXiv 2212.10650. As in LyCORIS, W1 has the smaller factor of each dimension, and two full
matrices have no rank to divide by. (PEFT divides, and doesn't swap.)
Identity at the start: W1 = 0. Needs only x and y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import AdapterConfig, by_path, probability
from ..core.errors import ConfigError, short_repr
from ..core.method import Layer, ParamSpec, Variant
from ..core.random import kaiming
from ..core.site import Params, Site
from ..core.torch_internals import first_of
from ..core.update_functions import Forms, Work
from ..kernels import low_rank


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        factor: how a dimension is split in two: -1 for the most square split; else the largest
            divisor of at most that.
        w1_shapes: {path: (l, m)}, the shape of W1 at some sites, instead of what `factor` gives.
            LyCORIS splits a convolution's channels, while d_in counts all entries of its kernel.
        decompose_both: W1 of low rank too, where that is smaller.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    factor: int = -1
    decompose_both: bool = False
    dropout: float = 0.0
    w1_shapes: tuple[tuple[str, tuple[int, int]], ...] = by_path(())

    def validate(self) -> None:
        probability(self.dropout, "LoKrConfig.dropout")
        for path, shape in self.w1_shapes:
            if min(shape) < 1:
                raise ConfigError(
                    f"LoKrConfig.w1_shapes[{short_repr(path)}]: expected two sizes of at least 1, "
                    f"found {shape}"
                )
        if self.factor < 1 and self.factor != -1:
            raise ConfigError(
                f"LoKrConfig.factor: expected -1 (most square) or at least 1, found {self.factor}"
            )


def split(width: int, factor: int) -> tuple[int, int]:
    """(small, large) with small * large = width: `factor` and its cofactor if it divides, else the
    largest divisor below.
    """
    if factor > 0 and width % factor == 0:
        return min(factor, width // factor), max(factor, width // factor)
    most = min(width if factor == -1 else factor, int(width**0.5))
    small = next(m for m in range(most, 0, -1) if width % m == 0)
    return small, width // small


class _Shape(NamedTuple):
    """W1 (l, m), W2 (k, n), and which of them is a full matrix."""

    l: int  # noqa: E741
    m: int
    k: int
    n: int
    full1: bool
    full2: bool


def _shape(cfg: LoKrConfig, site: Site) -> _Shape:
    """The shapes at a site.

    Raises:
        ConfigError: `w1_shapes` gives sizes that don't divide the layer's.
    """
    (l, k), (m, n) = split(site.d_out, cfg.factor), split(site.d_in, cfg.factor)  # noqa: E741
    given = first_of((shape for path, shape in cfg.w1_shapes if path == site.path), None)
    if given is not None:
        l, m = given  # noqa: E741
        if site.d_out % l or site.d_in % m:
            raise ConfigError(
                f"LoKrConfig.w1_shapes: {site.path!r}: W1 of shape {given} doesn't divide "
                f"({site.d_out}, {site.d_in})"
            )
        k, n = site.d_out // l, site.d_in // m
    full1 = not cfg.decompose_both or site.r >= max(l, m) / 2
    return _Shape(l, m, k, n, full1, site.r >= max(k, n) / 2)


def param_specs(cfg: LoKrConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_w1 (l, m) or its factors lora_w1_a (l, r), lora_w1_b (r, m); lora_w2 (k, n) or lora_w2_a
    (k, r), lora_w2_b (r, n).
    """
    s = _shape(cfg, site)
    if s.full1:
        specs = {"lora_w1": ParamSpec((s.l, s.m))}
    else:
        specs = {
            "lora_w1_a": ParamSpec((s.l, site.r)),
            "lora_w1_b": ParamSpec((site.r, s.m), kaiming),
        }
    if s.full2:
        return specs | {"lora_w2": ParamSpec((s.k, s.n), kaiming)}
    return specs | {
        "lora_w2_a": ParamSpec((s.k, site.r), kaiming),
        "lora_w2_b": ParamSpec((site.r, s.n), kaiming),
    }


def _factor(p: Params, name: str) -> Tensor:
    return p[name] if name in p else p[name + "_a"] @ p[name + "_b"]


def prepare(cfg: LoKrConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """s W1, (l, m)."""
    return _factor(p, "lora_w1") * site.scale


def outputs(cfg: LoKrConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + (s W1 X W2^T).view(d_out)."""
    h = low_rank.cast(x, d.dtype).unflatten(-1, (d.shape[1], -1))  # (..., m, n)
    low = "lora_w2" not in p
    h = F.linear(h, p["lora_w2_b" if low else "lora_w2"])  # (..., m, r or k)
    h = torch.einsum("lm,...mn->...ln", d, h)  # (..., l, r or k)
    if low:
        h = F.linear(h, p["lora_w2_a"])  # (..., l, k)
    return (y + h.flatten(-2)).to(y.dtype)


def weight(
    cfg: LoKrConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + s W1 (x) W2."""
    q = {name: t.to(W.dtype) for name, t in p.items()}
    W1, W2 = _factor(q, "lora_w1") * site.scale, _factor(q, "lora_w2")
    blocks = W1[:, None, :, None] * W2[None, :, None, :]  # (l, k, m, n)
    return W + blocks.flatten(2, 3).flatten(0, 1), b


def dense(cfg: LoKrConfig, site: Site, tokens: int) -> Forms:
    """Where building the Kronecker product costs less than three passes over the features."""
    row = Work(0.0, passes=3 * (site.d_in + site.d_out))
    return Forms(row, Work(0.0, passes=2 * site.d_in * site.d_out))


def scale(cfg: LoKrConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """W1 times c."""
    name = "lora_w1" if "lora_w1" in p else "lora_w1_a"
    return {**p, name: p[name] * c}


def scaling(cfg: LoKrConfig, site: Site) -> float:
    """alpha / r, or 1 where both factors are full."""
    s = _shape(cfg, site)
    return 1.0 if s.full1 and s.full2 else site.alpha / site.r


VARIANT = Variant(
    name="lokr",
    good_for="the smallest files, for image models",
    config=LoKrConfig,
    paper="Yeh et al. 2023, arXiv 2309.14859",
    param_specs=param_specs,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    additive=True,
    dense=dense,
    scale=scale,
    scaling=scaling,
)
