"""FRoD: the weight in a basis that layers share, where a diagonal and some entries are learned.

    W' = U (diag(l) + S) V^T,   W = U diag(l0) V^T,  columns of U of norm 1
    V (d_in, d_in) and its inverse frozen, one for all layers of a role;   l, l0 (d_in,)
    S (d_in, d_in) zero but for S[j_k, i_k] = s_k off its diagonal;   s (n,), places lora_idx (2, n)
    x' = x + ( (z * (l - l0) + z S^T) / l0 ) V^-1,   z = x V

U diag(l0) is W V^-T, so no U is kept: the layer's own call makes it. Paper: FRoD, AAAI 2026,
10.1609/aaai.v40i31.39813. V is a joint decomposition of the weights whose paths end in the same two
names: in other sets of layers it is another. It has d_in^2 numbers twice for each role. Equal
widths have equal places, drawn from `projection_seed` and the width alone.
Identity at the start: l = l0 (lora_lambda is l - l0) and s = 0. Needs the weights once. r and alpha
have no part in this method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, record
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import Layer, ParamSpec, Variant
from ..core.random import generator as seeded
from ..core.random import kept
from ..core.site import Params, Site
from ..core.statistics import SiteStatistics
from ..core.update_functions import Forms, Work
from ..kernels import low_rank, positions
from ..kernels.indices import check_indices
from ._joint_basis import basis, inverted, role, strengths

_SINGULAR = 1e7  # what the largest entries of V and of its inverse may come to


@dataclass(frozen=True, kw_only=True)
class FRoDConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r and alpha have no part in this method), and these. It has
    no dropout: it moves the layer's input, and not a branch of it.

    Args:
        sparse_rate: what part of S is learned, in (0, 1].
        projection_seed: of its places.
    """

    sparse_rate: float = 0.01
    projection_seed: int = record(0)

    def validate(self) -> None:
        if not 0.0 < self.sparse_rate <= 1.0:
            raise ConfigError(
                f"FRoDConfig.sparse_rate: expected a part in (0, 1], found {self.sparse_rate}"
            )


def _count(cfg: FRoDConfig, d_in: int) -> int:
    """n."""
    return min(max(int(d_in * d_in * cfg.sparse_rate), 1), d_in * d_in - d_in)


def param_specs(cfg: FRoDConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_lambda (d_in,), lora_s (n,); frozen lora_l0 (d_in,), lora_idx (2, n), lora_V
    and lora_V_inv (d_in, d_in).

    Raises:
        UnsupportedError: the layer has a single input.
    """
    n, d = _count(cfg, site.d_in), site.d_in
    if n < 1:
        raise UnsupportedError(
            "FRoD learns entries off a diagonal, of which a layer of one input has none; leave it "
            "out with exclude_names"
        )
    core = torch.float32
    return {
        "lora_lambda": ParamSpec((d,), dtype=core),
        "lora_s": ParamSpec((n,), dtype=core),
        "lora_l0": ParamSpec((d,), trainable=False, dtype=core),
        "lora_idx": positions.spec(n, d, d),
        "lora_V": ParamSpec((d, d), trainable=False, dtype=core),
        "lora_V_inv": ParamSpec((d, d), trainable=False, dtype=core),
    }


# -------------------------------------------------------------------------------------- the start
def joint(
    cfg: FRoDConfig, sites: Sequence[Site], weight: Callable[[Site], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """V and its inverse (d_in, d_in): {path: one pair for all sites of a role}."""
    groups: dict[tuple[str, int], list[Site]] = {}
    for site in sites:
        groups.setdefault((role(site.path), site.d_in), []).append(site)
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for group in groups.values():
        V = basis([weight(site) for site in group])
        pair = (V, inverted(V))
        made |= {site.path: pair for site in group}
    return made


@kept
def _places(seed: int, n: int, d: int) -> Tensor:
    """Rows and columns (2, n) of different entries off the diagonal."""
    flat = torch.randperm(d * d - d, generator=seeded(seed, f"{d}", "off the diagonal"))[:n]
    row, column = flat // (d - 1), flat % (d - 1)
    return torch.stack([row, column + (column >= row)])


def init(
    cfg: FRoDConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: SiteStatistics,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The shared basis, what the weight is in it, and the places.

    Raises:
        UnsupportedError: the weights of this role don't span a basis.
    """
    V, inverse = stats.joint
    if not float(V.abs().max() * inverse.abs().max()) < _SINGULAR:  # NaN is refused too
        raise UnsupportedError(
            "FRoD: the weights of this role have directions that are zero but for rounding, so "
            "they make no basis; leave the layer out with exclude_names"
        )
    return {
        "lora_l0": strengths(weight, inverse),
        "lora_idx": _places(cfg.projection_seed, _count(cfg, site.d_in), site.d_in),
        "lora_V": V,
        "lora_V_inv": inverse,
    }


# ------------------------------------------------------------------------------------- the phases
def _middle(p: Params, d: int, dtype: torch.dtype) -> Tensor:
    """diag(1 / l0) (S + diag(l - l0)) (d_in, d_in); rows of zeros where l0 is 0."""
    change, s, l0 = (p[f"lora_{name}"].to(dtype) for name in ("lambda", "s", "l0"))
    whole = positions.dense(p["lora_idx"], s, d, d) + torch.diag(change)
    return whole * torch.where(l0 > 0, 1.0 / l0, 0.0)[:, None]


def prepare(cfg: FRoDConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """The map of coordinates in the basis, (d_in, d_in)."""
    return _middle(p, site.d_in, p["lora_V"].dtype)


def inputs(cfg: FRoDConfig, p: Params, d: Tensor, x: Tensor, site: Site) -> Tensor:
    """x' = x + ((x V) d^T) V^-1, computed in float32 at least."""
    if not x.is_floating_point():
        return x  # the layer itself says what is wrong
    z = low_rank.project(x, p["lora_V"].mT)  # (..., d_in)
    return low_rank.add(x, z, d, p["lora_V_inv"].mT)


def weight(
    cfg: FRoDConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + (W V^-T) diag(1 / l0) (S + diag(l - l0)) V^T."""
    V, inverse = p["lora_V"].to(W.dtype), p["lora_V_inv"].to(W.dtype)
    return torch.addmm(W, (W @ inverse.mT) @ _middle(p, site.d_in, W.dtype), V.mT), b


def dense(cfg: FRoDConfig, site: Site, tokens: int) -> Forms:
    """Three products of d_in x d_in for each row, or three with the weight."""
    square = site.d_in * site.d_in
    return Forms(Work(3 * square), Work(3 * square * site.d_out, passes=2 * square))


def validate(cfg: FRoDConfig, p: Params, site: Site) -> None:
    """The places are different entries of S.

    Raises:
        StructureError: they aren't.
    """
    check_indices(p["lora_idx"].unbind(-2), (site.d_in, site.d_in), "lora_idx")


def scale(cfg: FRoDConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """l - l0 and s times c."""
    return {**p, "lora_lambda": p["lora_lambda"] * c, "lora_s": p["lora_s"] * c}


VARIANT = Variant(
    name="frod",
    good_for="few steps, all directions reachable",
    config=FRoDConfig,
    paper="FRoD 2026, AAAI 2026",
    param_specs=param_specs,
    init=init,
    joint=joint,
    prepare=prepare,
    inputs=inputs,
    weight=weight,
    validate=validate,
    dense=dense,
    scale=scale,
    needs=frozenset({"weight"}),
    sites=("linear",),
)
