"""BOFT: the input goes through a product of sparse rotations, and each output has a scale.

    y' = s * (W (x R)) + b,   W' = diag(s) W R^T,   R = M_{m-1} ... M_0
    M_i = P_i diag(R_i1 ... R_in) P_i^T,   R_ij = (I + Q)(I - Q)^-1 as in OFT
    P_i: in each run of b 2^i features, the even half-blocks first, then the odd ones; P_0 = I

Each factor mixes blocks further apart than the one before.
Paper: Liu et al. 2023, arXiv 2311.06243. The permutations are reshapes here; the released code
multiplies by dense ones. (It and PEFT have the inverse of R_ij: negate q.)
Identity at the start: Q = 0 and s = 1, exactly. Needs only x and y. r and alpha have no part in
this method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import Layer, ParamSpec, Variant
from ..core.site import Params, Site
from ..core.torch_internals import may_overwrite
from ..core.update_functions import Forms, Work
from ..kernels import block_diagonal, cayley, cost, low_rank


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r and alpha have no part in this method), and:

    Args:
        block_size: features per block, even unless m is 1; must divide d_in.
        m: number of butterfly factors; d_in must be divisible by block_size * 2^(m - 1).
    """

    block_size: int = 4
    m: int = 2

    def validate(self) -> None:
        if self.block_size < 2 or (self.m > 1 and self.block_size % 2):
            raise ConfigError(
                f"BOFTConfig.block_size: expected at least 2, and even for half-blocks to swap, "
                f"found {self.block_size}"
            )
        if self.m < 1:
            raise ConfigError(f"BOFTConfig.m: expected at least one factor, found {self.m}")


class Prepared(NamedTuple):
    """E = R - I of every block (m, n, b, b), or of their product as (n, b, b); gain s (d_out,);
    shift = (1 - s) b or None.
    """

    E: Tensor
    gain: Tensor
    shift: Tensor | None


def _span(cfg: BOFTConfig) -> int:
    """b 2^(m - 1), the length of the runs of features within which R mixes."""
    return cfg.block_size * 2 ** (cfg.m - 1)


def param_specs(cfg: BOFTConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_boft_q (m, n, b (b - 1) / 2), lora_boft_s (d_out,).

    Raises:
        UnsupportedError: d_in has no such butterfly.
    """
    block_diagonal.check_divides(
        "BOFT", "block_size", cfg.block_size, site.d_in, "d_in", even=cfg.m > 1
    )
    span = _span(cfg)
    if site.d_in % span:
        most = next(
            m for m in range(cfg.m, 0, -1) if site.d_in % (cfg.block_size * 2 ** (m - 1)) == 0
        )
        raise UnsupportedError(
            f"BOFT with block_size={cfg.block_size} and m={cfg.m} mixes runs of {span} features, "
            f"expected d_in divisible by it, found d_in={site.d_in}; m={most} fits"
        )
    return {
        "lora_boft_q": ParamSpec(
            (cfg.m, site.d_in // cfg.block_size, cayley.pairs(cfg.block_size)), dtype=torch.float32
        ),
        "lora_boft_s": ParamSpec((site.d_out,), "ones", dtype=torch.float32),
    }


def prepare(cfg: BOFTConfig, p: Params, site: Site, layer: Layer) -> Prepared:
    """All blocks' E at once, and the scale with what it must not do to the bias."""
    s = p["lora_boft_s"]
    shift = None if layer.bias is None else (1.0 - s) * layer.bias
    return Prepared(_rotation(cfg, p["lora_boft_q"]), s, shift)


def _factor(X: Tensor, E: Tensor, i: int) -> Tensor:
    """M_i^T X = X + P_i [E^T (P_i^T X)], for columns X (d_in, T)."""
    n, b, _ = E.shape
    # each run's two halves interleaved, half-block by half-block
    apart = X.unflatten(0, (-1, 2, 2**i, b // 2)).transpose(1, 2)
    turned = E.mT @ apart.reshape(n, b, X.shape[1])  # (n, b, T)
    halves = turned.unflatten(1, (2, -1)).unflatten(0, (-1, 2**i))
    return X + halves.transpose(1, 2).reshape(X.shape)


def _turn(x: Tensor, E: Tensor, transposed: bool = False) -> Tensor:
    """x R, or x R^T, for row vectors x (..., d_in). Inside, features go first, so that swapping
    half-blocks moves whole rows.
    """
    E = E.to(x.dtype)
    X = start = x.reshape(-1, x.shape[-1]).mT.contiguous()  # (d_in, T)
    factors = range(E.shape[0])
    for i in factors if transposed else reversed(factors):
        X = _factor(X, E[i].mT if transposed else E[i], i)
    # at the identity x stays as it came, memory layout too, so the same product follows bit by bit
    return x + (X - start).mT.reshape(x.shape)


def _rotation(cfg: BOFTConfig, q: Tensor) -> Tensor:
    """The factors' E (m, n, b, b), or that of their product where its blocks are short enough: one
    product of the input then does for m.
    """
    E = cayley.minus_identity(q, cfg.block_size)  # (m, n, b, b)
    span = _span(cfg)
    if cfg.m == 1:
        return block_diagonal.widened(E[0])
    costs = cost.costs_on(E.device)
    if costs is None or span > costs.butterfly_run:
        return E
    width = span * block_diagonal.together(E.shape[1] * cfg.block_size // span, span, E.device)
    *others, whole = (_within(E[i], i, width) for i in range(cfg.m))
    for F in reversed(others):
        whole = torch.baddbmm(whole + F, whole, F)  # (I + whole) (I + F) - I
    return whole


def _within(E: Tensor, i: int, width: int) -> Tensor:
    """M_i - I in each `width` features, (d_in / width, width, width)."""
    b, k = E.shape[-1], 2**i  # k blocks mix in a run
    runs = width // (k * b)
    # a run's even half-blocks, then the odd ones
    halves = E.reshape(-1, runs, k, 2, b // 2, 1, 2, 1, b // 2).transpose(2, 3)
    apart = torch.eye(runs * k, dtype=E.dtype, device=E.device).view(runs, 1, k, 1, runs, 1, k, 1)
    return (halves * apart).reshape(-1, width, width)


def inputs(cfg: BOFTConfig, p: Params, d: Prepared, x: Tensor, site: Site) -> Tensor:
    """x R."""
    return _turn(x, d.E) if d.E.ndim == 4 else block_diagonal.plus_product(x, d.E)


def outputs(cfg: BOFTConfig, p: Params, d: Prepared, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """s * (y - b) + b."""
    return (y * d.gain if d.shift is None else torch.addcmul(d.shift, y, d.gain)).to(y.dtype)


def weight(
    cfg: BOFTConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """diag(s) W R^T, b."""
    E = _rotation(cfg, p["lora_boft_q"].to(low_rank.core_dtype(W.dtype)))
    turned = _turn(W, E, transposed=True) if E.ndim == 4 else block_diagonal.plus_product(W, E.mT)
    s = p["lora_boft_s"].to(W.dtype)[:, None]
    return turned.mul_(s) if may_overwrite() else turned * s, b


def dense(cfg: BOFTConfig, site: Site, tokens: int) -> Forms:
    """The same turn for each row of x and of W; the latter are scaled in place."""
    turn = Work(_span(cfg) * site.d_in, passes=3 * site.d_in)
    row = turn._replace(passes=turn.passes + site.d_out)
    each = turn._replace(passes=turn.passes + site.d_in / 2)
    return Forms(row, Work(each.multiply_adds * site.d_out, each.passes * site.d_out))


def scale(cfg: BOFTConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """Q times c, the scale moved along its line from 1."""
    return {"lora_boft_q": p["lora_boft_q"] * c, "lora_boft_s": 1.0 + c * (p["lora_boft_s"] - 1.0)}


VARIANT = Variant(
    name="boft",
    good_for="OFT with fewer numbers, wider rotations",
    config=BOFTConfig,
    paper="Liu et al. 2023, arXiv 2311.06243",
    param_specs=param_specs,
    prepare=prepare,
    inputs=inputs,
    outputs=outputs,
    weight=weight,
    dense=dense,
    scale=scale,
)
