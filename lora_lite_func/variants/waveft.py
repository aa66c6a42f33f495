"""WaveFT: the update is the inverse wavelet transform of a few learned coefficients.

    W' = W + alpha R_o C R_i^T,   C (e_out, e_in) zero but for C[j_k, l_k] = c_k,  e = d made even
    c (n,), places lora_idx (2, n)
    R of Haar's wavelet: the first half of its columns are (1, 1) / sqrt(2) on neighbours, the
    second half (1, -1) / sqrt(2)

So c_k is a 2 x 2 block of the update, of one size and four patterns of signs. x is transformed in
one pass, n of its coefficients are picked and added, and y gets them back in one pass.
Paper: Bilican et al. 2025, arXiv 2505.12532, which has other wavelets too. Equal shapes have equal
places, drawn from `projection_seed` and the shape alone.
Identity at the start: c = 0. Needs only x and y. r has no part in this method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability, record
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import Layer, ParamSpec, Variant
from ..core.site import Params, Site
from ..core.update_functions import Forms, Work
from ..kernels import low_rank, positions
from ..kernels.indices import check_indices

_ROOT = math.sqrt(0.5)


@dataclass(frozen=True, kw_only=True)
class WaveFTConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r has no part in this method), and:

    Args:
        alpha: strength; large, since a coefficient is spread over four entries.
        n_frequency: how many coefficients are learned.
        projection_seed: of their places.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    alpha: float = 25.0
    n_frequency: int = 2592
    projection_seed: int = record(0)
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "WaveFTConfig.dropout")
        if self.n_frequency < 1:
            raise ConfigError(
                f"WaveFTConfig.n_frequency: expected at least 1, found {self.n_frequency}"
            )


def _even(site: Site) -> tuple[int, int]:
    """The sizes of C: d_out and d_in, made even."""
    return site.d_out + site.d_out % 2, site.d_in + site.d_in % 2


def param_specs(cfg: WaveFTConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_c (n,), frozen lora_idx (2, n).

    Raises:
        UnsupportedError: there are fewer entries.
    """
    if cfg.n_frequency > site.d_in * site.d_out:
        raise UnsupportedError(
            f"WaveFT picks n_frequency different coefficients, expected at most d_out * d_in = "
            f"{site.d_out * site.d_in}, found {cfg.n_frequency}"
        )
    return {
        "lora_c": ParamSpec((cfg.n_frequency,)),
        "lora_idx": positions.spec(cfg.n_frequency, *_even(site)),
    }


def init(
    cfg: WaveFTConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The places, which the site's path has no part in."""
    return {"lora_idx": positions.drawn(cfg.projection_seed, cfg.n_frequency, *_even(site))}


def _analysed(X: Tensor) -> Tensor:
    """R^T X for columns X (d, ...): sums of neighbours, then their differences, (e, ...)."""
    if X.shape[0] % 2:
        X = torch.cat([X, X.new_zeros(1, *X.shape[1:])])
    first, second = X[::2], X[1::2]
    return torch.cat([first + second, first - second]) * _ROOT


def _synthesised(C: Tensor, d: int) -> Tensor:
    """R C for columns C (e, ...), (d, ...)."""
    low, high = C.chunk(2)
    return (torch.stack([low + high, low - high], dim=1) * _ROOT).flatten(0, 1)[:d]


def prepare(
    cfg: WaveFTConfig, p: Params, site: Site, layer: Layer
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and the coefficients times alpha, (n,) each."""
    rows, columns = positions.unpack(p["lora_idx"], *_even(site))
    return rows, columns, p["lora_c"] * site.scale


def outputs(
    cfg: WaveFTConfig,
    p: Params,
    d: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    y: Tensor,
    site: Site,
) -> Tensor:
    """y + alpha R_o C (R_i^T x). Inside, features go first, so that picking and adding
    coefficients moves whole rows.
    """
    rows, columns, c = d
    X = low_rank.cast(x, c.dtype).reshape(-1, site.d_in).mT  # (d_in, T)
    picked = _analysed(X).index_select(0, columns) * c[:, None]  # (n, T)
    zeros = picked.new_zeros(_even(site)[0], picked.shape[1])
    update = _synthesised(zeros.index_add(0, rows, picked), site.d_out)
    return (y + update.mT.reshape(y.shape)).to(y.dtype)


def weight(
    cfg: WaveFTConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + alpha R_o C R_i^T."""
    C = positions.dense(p["lora_idx"], p["lora_c"].to(W.dtype) * site.scale, *_even(site))
    return W + _synthesised(_synthesised(C, site.d_out).mT, site.d_in).mT, b


def dense(cfg: WaveFTConfig, site: Site, tokens: int) -> Forms:
    """A row of x transformed there and back, or the update transformed once."""
    row = Work(0.0, passes=4 * (site.d_in + site.d_out) + 4 * cfg.n_frequency)
    return Forms(row, Work(0.0, passes=8 * site.d_in * site.d_out))


def scale(cfg: WaveFTConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """The coefficients times c."""
    return {**p, "lora_c": p["lora_c"] * c}


def scaling(cfg: WaveFTConfig, site: Site) -> float:
    """alpha."""
    return site.alpha


def validate(cfg: WaveFTConfig, p: Params, site: Site) -> None:
    """The places are different ones of the transform's.

    Raises:
        StructureError: they aren't.
    """
    rows, columns = p["lora_idx"].unbind(-2)
    check_indices((rows, columns), _even(site), "lora_idx")


VARIANT = Variant(
    name="waveft",
    good_for="a budget by number, not rank",
    config=WaveFTConfig,
    paper="Bilican et al. 2025, arXiv 2505.12532",
    param_specs=param_specs,
    init=init,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    additive=True,
    validate=validate,
    dense=dense,
    scale=scale,
    scaling=scaling,
)
