"""AdaMSS: outputs are clustered by their principal coordinates, each cluster has a small update.

    y_o' = y_o + B_o A_k N x       k = cluster[o]
    W ~ U S N: the r largest singular directions, N (r, d_in) frozen; rows of U in K clusters
    A (K, q, r), B (d_out, q), of which output o uses its own cluster's A and its row of B

As a product of two factors it has rank K q, of which each row of the second uses q. Paper: AdaMSS,
NeurIPS 2025, openreview 8ZdWmpYxT0; clusters by k-means from rows drawn at random, and A_k starts
at the q largest right singular directions of its rows of U. (PEFT appends the bias to W as a
column.)
Identity at the start: B = 0. Needs W once, for the decomposition. alpha has no part in this method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability, record
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import ParamSpec, Variant
from ..core.site import Params, Site
from ..kernels import low_rank
from ..kernels.indices import check_indices
from ..kernels.positions import decoded, index_dtype
from ._made_pair import Pair, made_pair
from ._pair import scale

_STEPS = 10  # of k-means


@dataclass(frozen=True, kw_only=True)
class AdaMSSConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part in this method), and:

    Args:
        r: number of principal directions in which x is seen.
        num_subspaces: K, the number of clusters.
        subspace_rank: q, the rank of each cluster's update, at most r.
        svd_niter: None for the full SVD; a number for the randomised one with that many power
            iterations (4 to 16).
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    svd_niter: int | None = record(None)
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "AdaMSSConfig.dropout")
        if self.svd_niter is not None and self.svd_niter < 0:
            raise ConfigError(
                f"AdaMSSConfig.svd_niter: expected None or at least 0, found {self.svd_niter}"
            )
        for name in ("num_subspaces", "subspace_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"AdaMSSConfig.{name}: expected at least 1, found {getattr(self, name)}"
                )


def param_specs(cfg: AdaMSSConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_A (K, q, r), lora_B (d_out, q); frozen lora_N (r, d_in), lora_cluster
    (d_out,).

    Raises:
        UnsupportedError: r is above min(d_in, d_out), subspace_rank above r, or num_subspaces above
            d_out.
    """
    low_rank.check_rank(site, "AdaMSS")
    k, q = cfg.num_subspaces, cfg.subspace_rank
    for name, value, most, what in (
        ("num_subspaces", k, site.d_out, "outputs"),
        ("subspace_rank", q, site.r, "principal directions"),
    ):
        if value > most:
            raise UnsupportedError(
                f"AdaMSS: {name}={value} is more than the {most} {what} here; lower it, or leave "
                f"the layer out with exclude_names"
            )
    return {
        "lora_A": ParamSpec((k, q, site.r)),
        "lora_B": ParamSpec((site.d_out, q)),
        "lora_N": ParamSpec((site.r, site.d_in), trainable=False),
        "lora_cluster": ParamSpec((site.d_out,), trainable=False, dtype=index_dtype(k)),
    }


def init(
    cfg: AdaMSSConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The directions, the clusters, and each cluster's own directions among them."""
    U, _, N = low_rank.top_svd(weight, site.r, cfg.svd_niter, generator("lora_N"))
    cluster = _clustered(U, cfg.num_subspaces, generator("lora_cluster"))
    A = U.new_zeros(specs["lora_A"].shape)
    for k in range(cfg.num_subspaces):
        own = torch.linalg.svd(U[cluster == k], full_matrices=False)[2][: cfg.subspace_rank]
        A[k, : len(own)] = own
    return {"lora_A": A, "lora_N": N, "lora_cluster": cluster}


def _clustered(points: Tensor, count: int, gen: torch.Generator) -> Tensor:
    """The nearest of `count` centres (n,) of each point (n, r), after some steps of k-means."""
    first = torch.randperm(len(points), generator=gen, device="cpu")[:count]
    centres = points[first.to(points.device)]
    for _ in range(_STEPS):
        near = torch.cdist(points, centres).argmin(1)
        member = (near[:, None] == torch.arange(count, device=near.device)).to(points.dtype)
        size = member.sum(0)[:, None]
        centres = torch.where(size > 0, member.mT @ points / size.clamp_min(1.0), centres)
    return torch.cdist(points, centres).argmin(1)


def _factors(cfg: AdaMSSConfig, p: Params, site: Site, dtype: torch.dtype | None) -> Pair:
    """A_k N, (K q, d_in), and B_o of each output in the place of its cluster, (d_out, K q)."""
    dtype = p["lora_A"].dtype if dtype is None else dtype
    A, B, N = (p[f"lora_{name}"].to(dtype) for name in ("A", "B", "N"))
    count = A.shape[0]
    cluster = decoded(p["lora_cluster"], count)
    own = cluster[:, None] == torch.arange(count, device=cluster.device)  # (d_out, K)
    return A.flatten(0, 1) @ N, (own[:, :, None] * B[:, None, :]).flatten(1)


_PHASES = made_pair(_factors, scaled=False)


def validate(cfg: AdaMSSConfig, p: Params, site: Site) -> None:
    """Check that each output is in one of the clusters.

    Raises:
        StructureError: it isn't.
    """
    check_indices((p["lora_cluster"],), (cfg.num_subspaces,), "lora_cluster", once=False)


VARIANT = Variant(
    name="adamss",
    good_for="few numbers for wide layers",
    config=AdaMSSConfig,
    paper="AdaMSS 2025, NeurIPS 2025",
    param_specs=param_specs,
    init=init,
    prepare=_PHASES.prepare,
    outputs=_PHASES.outputs,
    weight=_PHASES.weight,
    additive=True,
    validate=validate,
    scale=scale,
    low_rank_factors=_PHASES.low_rank_factors,
    needs=frozenset({"weight"}),
)
