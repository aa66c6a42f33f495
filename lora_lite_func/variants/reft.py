"""ReFT: the hidden states of a few prompt tokens are edited in a low-rank subspace.

    loreft:   h' = h + R^T (W h + b - R h)     R (r, d) with orthonormal rows, W (r, d), b (r,)
    direft:   h' = h + B (A h + b)             A (r, d), B (d, r), b (r,)

A site is a module whose output is a hidden state (..., T, d), such as a decoder block; of a tuple
it is the first member. The first `first` and the last `last` tokens of the prompt are edited. Of a
prompt of n < first + last tokens those are the first min(first, n // 2) and the last
min(last, n - n // 2). Tokens that are generated later aren't edited.

Paper: Wu et al. 2024, arXiv 2404.03592. R = L^-1 M with L L^T = M M^T (Cholesky), so an orthonormal
M is R itself.
Identity at the start: W is learned as its distance from the start R0 of R. Then
W - R = lora_W + (R0 - R) is exactly zero in every dtype while lora_W = 0 and M = M0, and b = 0.
(The released code's random W isn't the identity.) DiReFT: B = 0. Needs only h.
No weight acts on some tokens alone, so it can't be merged. alpha has no part in this method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import ConfigError
from ..core.method import Layer, ParamSpec, Variant
from ..core.random import kaiming, normal
from ..core.site import Params, Site
from ..kernels import low_rank
from ._pair import scale


@dataclass(frozen=True, kw_only=True)
class _ReFTConfig(AdapterConfig):
    first: int = 4
    last: int = 4
    tied: bool = True

    def validate(self) -> None:
        if min(self.first, self.last) < 0 or self.first + self.last < 1:
            found = f"first={self.first}, last={self.last}"
            raise ConfigError(
                f"{type(self).__name__}: expected first and last of at least 0 and one of them "
                f"more, found {found}"
            )


@dataclass(frozen=True, kw_only=True)
class LoReFTConfig(_ReFTConfig):
    """Shared fields (see AdapterConfig; sites are modules, by default the blocks of a model's
    ModuleLists; alpha has no part), and:

    Args:
        r: dimension of the subspace, at most the hidden width.
        first: how many tokens from the prompt's beginning are edited.
        last: how many up to its end.
        tied: one edit for both ends; False learns one for the first tokens and another for the
            last.
    """


@dataclass(frozen=True, kw_only=True)
class DiReFTConfig(_ReFTConfig):
    """As LoReFTConfig, for the form without orthonormal rows."""


# ------------------------------------------------------------------------------------------ tensors
def _ends(cfg: _ReFTConfig) -> int:
    """How many edits are learned: one, or one for each end that is edited."""
    return 1 if cfg.tied else (cfg.first > 0) + (cfg.last > 0)


def loreft_specs(cfg: LoReFTConfig, site: Site) -> dict[str, ParamSpec]:
    """M lora_R, W - R0 lora_W (k, r, d), lora_b (k, r), frozen M0 lora_R0 (k, r, d); k = 2 where
    the ends aren't tied, else 1.

    Raises:
        UnsupportedError: r is above the hidden width.
    """
    low_rank.check_rank(site, "LoReFT")
    shape = (_ends(cfg), site.r, site.d_out)
    frozen = ParamSpec(shape, trainable=False)
    return {
        "lora_R": ParamSpec(shape),
        "lora_R0": frozen,
        "lora_W": ParamSpec(shape),
        "lora_b": ParamSpec(shape[:2]),
    }


def direft_specs(cfg: DiReFTConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (k, r, d), lora_B (k, d, r), lora_b (k, r)."""
    k, r, d = _ends(cfg), site.r, site.d_out
    return {
        "lora_A": ParamSpec((k, r, d), kaiming),
        "lora_B": ParamSpec((k, d, r)),
        "lora_b": ParamSpec((k, r)),
    }


def _orthonormal(M: Tensor) -> Tensor:
    """R (..., r, d) with the row space of M and orthonormal rows, in float32 at least."""
    M = M.to(low_rank.core_dtype(M.dtype))
    with torch.autocast("cpu" if M.is_meta else M.device.type, enabled=False):
        L = torch.linalg.cholesky_ex(M @ M.mT)[0]  # unchecked, so no wait for the device
        return torch.linalg.solve_triangular(L, M, upper=False)


def init(
    cfg: LoReFTConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """M random with orthonormal rows."""
    draw = normal(1.0)(specs["lora_R"].shape, generator("lora_R")).double()
    M = torch.linalg.qr(draw.mT)[0].mT  # (k, r, d)
    return {"lora_R": M, "lora_R0": M}


# ---------------------------------------------------------------------------------------- positions
def _chosen(cfg: _ReFTConfig, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are edited: their indices (N, first + last), and which of those count (N, first
        + last).

    Args:
        cfg: how many at each end.
        prompt: (N, T) bool, the tokens of the prompt.
    """
    count = prompt.sum(-1, keepdim=True)  # (N, 1) tokens n of each prompt
    short = count < cfg.first + cfg.last
    first = torch.where(short, (count // 2).clamp_max(cfg.first), cfg.first)
    last = torch.where(short, (count - count // 2).clamp_max(cfg.last), cfg.last)
    ahead, behind = (torch.arange(n, device=prompt.device) for n in (cfg.first, cfg.last))
    # which token of the prompt, counted from its beginning
    rank = torch.cat([ahead.expand(prompt.shape[0], -1), count - 1 - behind], dim=-1)
    counts = torch.cat([ahead < first, behind < last], dim=-1)
    before = prompt.cumsum(-1)[:, None, :] <= rank[..., None]  # (N, first + last, T)
    place = before.sum(-1)
    return place.clamp_max(prompt.shape[-1] - 1), counts


def _edited(
    cfg: _ReFTConfig, prompt: Tensor, y: Tensor, change: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """y (..., T, d) with `change` (h (N, m, d), which edit) added at the chosen tokens."""
    if y.numel() == 0:
        return y
    tokens = y.unsqueeze(-2) if y.ndim == 1 else y
    rows = tokens.reshape(-1, *tokens.shape[-2:])  # (N, T, d)
    place, counts = _chosen(cfg, prompt.expand(tokens.shape[:-1]).reshape(rows.shape[:-1]))
    index = place[..., None].expand(-1, -1, rows.shape[-1])
    h = rows.gather(1, index)  # (N, first + last, d)
    if cfg.tied or not (cfg.first and cfg.last):
        delta = change(h, 0)
    else:
        delta = torch.cat([change(h[:, : cfg.first], 0), change(h[:, cfg.first :], 1)], dim=1)
    delta = torch.where(counts[..., None], delta, 0.0).to(y.dtype)
    return rows.scatter_add(1, index, delta).reshape(y.shape)


# ------------------------------------------------------------------------------------------- phases
def _apart(p: Params) -> tuple[Tensor, Tensor]:
    """R and W - R, (k, r, d) each, in float32 at least."""
    R = _orthonormal(p["lora_R"])
    return R, p["lora_W"] + (_orthonormal(p["lora_R0"]) - R)


def prepare(cfg: LoReFTConfig, p: Params, site: Site, layer: Layer) -> tuple[Tensor, Tensor]:
    """R and W - R, (k, r, d) each, in the adapter's dtype."""
    R, apart = _apart(p)
    return R.to(p["lora_R"].dtype), apart.to(p["lora_R"].dtype)


def loreft(
    cfg: LoReFTConfig, p: Params, d: tuple[Tensor, Tensor], x: Tensor, y: Tensor, site: Site
) -> Tensor:
    """h + R^T ((W - R) h + b) at the chosen tokens; x (..., T) says which belong to the prompt."""
    R, apart = d

    def change(h: Tensor, i: int) -> Tensor:
        return (low_rank.cast(h, R.dtype) @ apart[i].mT + p["lora_b"][i]) @ R[i]

    return _edited(cfg, x, y, change)


def direft(cfg: DiReFTConfig, p: Params, d: None, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """h + B (A h + b) at the chosen tokens; x (..., T) says which belong to the prompt."""
    A, B, b = p["lora_A"], p["lora_B"], p["lora_b"]

    def change(h: Tensor, i: int) -> Tensor:
        return (low_rank.cast(h, A.dtype) @ A[i].mT + b[i]) @ B[i].mT

    return _edited(cfg, x, y, change)


def loreft_scale(cfg: LoReFTConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """W - R and b times c."""
    _, apart = _apart(p)  # lora_W + R0 - R
    return {**p, "lora_W": p["lora_W"] + (c - 1.0) * apart, "lora_b": c * p["lora_b"]}


_PAPER = "Wu et al. 2024, arXiv 2404.03592"
_KINDS = ("module",)

VARIANT = Variant(
    name="loreft",
    good_for="editing hidden states of few tokens",
    config=LoReFTConfig,
    paper=_PAPER,
    param_specs=loreft_specs,
    init=init,
    prepare=prepare,
    outputs=loreft,
    scale=loreft_scale,
    sites=_KINDS,
)
VARIANT_DIRECT = Variant(
    name="direft",
    good_for="LoReFT, simpler and a little faster",
    config=DiReFTConfig,
    paper=_PAPER,
    param_specs=direft_specs,
    outputs=direft,
    scale=scale,
    sites=_KINDS,
)
