"""FourierFT: the update is the inverse 2-D Fourier transform of a few learned coefficients.

    W' = W + alpha Re ifft2(F),   F zero but for F[j_k, l_k] = c_k
    c (n,) learned, frequencies (2, n) fixed and random
    y' = y + alpha Re ifft_{d_out}( sum_k c_k e_{j_k} ifft_{d_in}(x)[l_k] )

Paper: Gao et al. 2024, arXiv 2405.03003. x is real and so is the result, hence half spectra do: a
frequency above the middle is the conjugate of its mirror image, in both dimensions. The phases
never build W'.
Identity at the start: c = 0 (the paper and PEFT draw it). Needs only x and y. r has no part in this
method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability, record
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import Layer, ParamSpec, Variant
from ..core.site import Params, Site
from ..core.torch_internals import may_overwrite
from ..core.update_functions import Forms, Work
from ..kernels import low_rank, positions
from ..kernels.indices import check_indices


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r has no part in this method), and:

    Args:
        alpha: what the transform is multiplied by (paper: 100 to 300); it is not divided by
            anything.
        n_frequency: how many coefficients.
        projection_seed: of the frequencies, which are the same for every layer of a shape.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    alpha: float = 150.0
    n_frequency: int = 1000
    projection_seed: int = record(777)
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "FourierFTConfig.dropout")
        if self.n_frequency < 1:
            raise ConfigError(
                f"FourierFTConfig.n_frequency: expected at least 1, found {self.n_frequency}"
            )


class Prepared(NamedTuple):
    """Per coefficient: where it reads (l) and adds (j) in the half spectra, and its factors of the
    real and imaginary parts.
    """

    l: Tensor  # noqa: E741
    j: Tensor
    real: Tensor
    imaginary: Tensor


def param_specs(cfg: FourierFTConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_c (n,), frozen lora_idx (2, n).

    Raises:
        UnsupportedError: more coefficients than the weight has entries.
    """
    if cfg.n_frequency > site.d_in * site.d_out:
        raise UnsupportedError(
            f"FourierFT has a coefficient per frequency, expected n_frequency of at most d_out * "
            f"d_in = {site.d_in * site.d_out}, found {cfg.n_frequency}; lower n_frequency"
        )
    return {
        "lora_c": ParamSpec((cfg.n_frequency,)),
        "lora_idx": positions.spec(cfg.n_frequency, site.d_out, site.d_in),
    }


def init(
    cfg: FourierFTConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The frequencies, which the site's path has no part in."""
    return {
        "lora_idx": positions.drawn(cfg.projection_seed, cfg.n_frequency, site.d_out, site.d_in)
    }


def prepare(cfg: FourierFTConfig, p: Params, site: Site, layer: Layer) -> Prepared:
    """Frequencies folded into half spectra."""
    j, l = positions.unpack(p["lora_idx"], site.d_out, site.d_in)  # noqa: E741
    mirrored_j, mirrored_l = 2 * j > site.d_out, 2 * l > site.d_in
    j, l = torch.where(mirrored_j, site.d_out - j, j), torch.where(mirrored_l, site.d_in - l, l)  # noqa: E741
    # a frequency that is its own mirror image: the result has only its real part
    alone = (j == 0) | (2 * j == site.d_out)
    c = p["lora_c"].to(low_rank.core_dtype(p["lora_c"].dtype)) * (site.scale / site.d_in)
    real = torch.where(alone, c, 0.5 * c)
    # ifft(x)[l] is conj(rfft(x)[l]) / d_in; each mirror conjugates once more
    imaginary = torch.where(alone, 0.0, torch.where(mirrored_j == mirrored_l, -0.5 * c, 0.5 * c))
    return Prepared(l, j, real, imaginary)


def outputs(
    cfg: FourierFTConfig, p: Params, d: Prepared, x: Tensor, y: Tensor, site: Site
) -> Tensor:
    """y + alpha Re ifft(scattered c * ifft(x)). Inside, frequencies go first, so that picking and
    adding them moves whole rows.
    """
    if not x.numel():
        return y  # MKL's transforms refuse an empty batch
    rows = x.reshape(-1, site.d_in).to(d.real.dtype).contiguous()  # MKL refuses expanded ones
    spectrum = torch.fft.rfft(rows).mT  # (d_in // 2 + 1, T)
    zeros = torch.zeros(site.d_out // 2 + 1, spectrum.shape[1], dtype=d.real.dtype, device=x.device)
    picked_real = spectrum.real.contiguous().index_select(0, d.l)  # (n, T)
    picked_imaginary = spectrum.imag.contiguous().index_select(0, d.l)
    real = zeros.index_add(0, d.j, picked_real * d.real[:, None])  # (d_out // 2 + 1, T)
    imaginary = zeros.index_add(0, d.j, picked_imaginary * d.imaginary[:, None])
    update = torch.fft.irfft(torch.complex(real, imaginary).mT, n=site.d_out)  # (T, d_out)
    return (y + update.view(y.shape)).to(y.dtype)


def _upper(idx: Tensor, c: Tensor, site: Site) -> Tensor:
    """The first rows, (d_out // 2 + 1, d_in), of D = Re ifft2(F) for the coefficients c (n,), from
    half the columns of F made even.
    """
    rows, columns, half = site.d_out, site.d_in, site.d_in // 2 + 1
    j, l = positions.unpack(idx, rows, columns)  # noqa: E741
    j2, l2 = -j % rows, -l % columns
    left, left2 = l < half, l2 < half
    # rfft has the other sign than ifft, so along j each coefficient takes its mirror's place
    place = torch.cat([torch.where(left, l * rows + j2, 0), torch.where(left2, l2 * rows + j, 0)])
    value = torch.cat([torch.where(left, c, 0.0), torch.where(left2, c, 0.0)]) * (0.5 / rows)
    zeros = torch.zeros(half * rows, dtype=c.dtype, device=c.device)
    even = zeros.index_add(0, place, value).view(half, rows)
    return torch.fft.irfft(torch.fft.rfft(even).mT, n=columns)


def weight(
    cfg: FourierFTConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + D, D = alpha Re ifft2(F). D is even, D[-o, -i] = D[o, i], so the first half of its rows
    says all.
    """
    upper = _upper(p["lora_idx"], p["lora_c"].to(W.dtype) * site.scale, site)
    k = upper.shape[0]
    lower = upper[1 : (site.d_out + 1) // 2].flip(0, 1)  # its last column belongs first
    if not may_overwrite():
        return W + torch.cat([upper, lower.roll(1, 1)]), b
    new = torch.empty_like(W)
    torch.add(W[:k], upper, out=new[:k])
    torch.add(W[k:, 1:], lower[:, :-1], out=new[k:, 1:])
    torch.add(W[k:, :1], lower[:, -1:], out=new[k:, :1])
    return new, b


def dense(cfg: FourierFTConfig, site: Site, tokens: int) -> Forms:
    """A row of x transformed there and back, with what it keeps for the backward pass, or the
    update transformed once.
    """
    row = Work(0.0, passes=10 * (site.d_in + site.d_out) + 6 * cfg.n_frequency)
    return Forms(row, Work(0.0, passes=7 * site.d_in * site.d_out))


def scale(cfg: FourierFTConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """The coefficients times c."""
    return {**p, "lora_c": p["lora_c"] * c}


def scaling(cfg: FourierFTConfig, site: Site) -> float:
    """alpha."""
    return site.alpha


def validate(cfg: FourierFTConfig, p: Params, site: Site) -> None:
    """The entries are different ones of the matrix.

    Raises:
        StructureError: they aren't.
    """
    rows, columns = p["lora_idx"].unbind(-2)
    check_indices((rows, columns), (site.d_out, site.d_in), "lora_idx")


VARIANT = Variant(
    name="fourierft",
    good_for="tiny files that change every entry",
    config=FourierFTConfig,
    paper="Gao et al. 2024, arXiv 2405.03003",
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
