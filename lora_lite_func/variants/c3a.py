"""C3A: the update is a grid of circulant matrices, so it is applied by short Fourier transforms.

    y_i' = y_i + (1 / d_in) sum_j C(w_ij) x_j        w (d_out / b, d_in / b, b)
    C(w)[p, q] = w[(q - p) mod b],   C(w) x = irfft( rfft(x) conj(rfft(w)) )

Paper: Chen et al. 2024, arXiv 2407.19342; the factor 1 / d_in is PEFT's. (The backward pass that
the paper and PEFT write by hand gives a wrong gradient for x: it takes C(w)^T for C(w). Here
autograd differentiates the transforms.)
Identity at the start: w = 0 (PEFT draws it). Needs only x and y. r and alpha have no part in this
method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.errors import ConfigError
from ..core.method import Layer, ParamSpec, Variant
from ..core.site import Params, Site
from ..core.update_functions import Forms, Work
from ..kernels import block_diagonal, cost


@dataclass(frozen=True, kw_only=True)
class C3AConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r and alpha have no part in this method), and:

    Args:
        block_size: of the circulant blocks; must divide d_in and d_out. Larger blocks have fewer
            parameters.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    block_size: int = 256
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "C3AConfig.dropout")
        if self.block_size < 1:
            raise ConfigError(f"C3AConfig.block_size: expected at least 1, found {self.block_size}")


def param_specs(cfg: C3AConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_w (d_out / b, d_in / b, b).

    Raises:
        UnsupportedError: d_in or d_out isn't divisible by block_size.
    """
    b = cfg.block_size
    block_diagonal.check_divides("C3A", "block_size", b, site.d_in, "d_in")
    block_diagonal.check_divides("C3A", "block_size", b, site.d_out, "d_out")
    return {"lora_w": ParamSpec((site.d_out // b, site.d_in // b, b), dtype=torch.float32)}


def prepare(cfg: C3AConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """The kernels' conjugate spectra over d_in, (d_out / b, d_in / b, b // 2 + 1)."""
    return torch.fft.rfft(p["lora_w"] / site.d_in).conj()


def _correlate(X: Tensor, K: Tensor) -> Tensor:
    """sum_j X_j K_ij, frequency by frequency: (..., n, f) and (m, n, f) give (..., m, f)."""
    n = K.shape[1]
    costs = cost.costs_on(X.device)
    if costs is None or n > costs.circulant_blocks:
        return torch.einsum("...nf,mnf->...mf", X, K)
    total = X[..., 0, None, :] * K[:, 0]
    for j in range(1, n):
        total = total + X[..., j, None, :] * K[:, j]  # addcmul has no vmap rule
    return total


def outputs(cfg: C3AConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + the grid of circular correlations."""
    if not x.numel():
        return y  # MKL's transforms refuse an empty batch
    blocks = x.unflatten(-1, (-1, cfg.block_size)).to(p["lora_w"].dtype)  # (..., n, b)
    spectrum = _correlate(torch.fft.rfft(blocks), d)  # (..., m, b // 2 + 1)
    return (y + torch.fft.irfft(spectrum, n=cfg.block_size).flatten(-2)).to(y.dtype)


def weight(
    cfg: C3AConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + the grid of circulant matrices over d_in."""
    w, size = p["lora_w"].to(W.dtype) / site.d_in, cfg.block_size
    windows = torch.cat([w, w], dim=-1).unfold(-1, size, 1)  # (m, n, b + 1, b)
    shifts = windows[..., 1:, :]  # row i holds w[(q + i + 1) mod b]
    grid = shifts.transpose(1, 2).flip(1)  # (m, b, n, b): row p holds w[(q - p) mod b]
    return (W.view(grid.shape) + grid).reshape(W.shape), b


def dense(cfg: C3AConfig, site: Site, tokens: int) -> Forms:
    """A row of x transformed, multiplied and transformed back, or the blocks written out."""
    wide, size = site.d_in + site.d_out, site.d_in * site.d_out
    return Forms(Work(0.0, 6 * wide + 2 * size / cfg.block_size), Work(0.0, 4 * size))


def scale(cfg: C3AConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """w times c."""
    return {"lora_w": p["lora_w"] * c}


VARIANT = Variant(
    name="c3a",
    good_for="high rank on wide layers, cheaply",
    config=C3AConfig,
    paper="Chen et al. 2024, arXiv 2407.19342",
    param_specs=param_specs,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    additive=True,
    dense=dense,
    scale=scale,
)
