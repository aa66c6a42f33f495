"""Arrow: one adapter of several trained LoRAs, each token routed by their own directions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.adapter import Adapter
from ..core.adapter_shapes import check_shapes
from ..core.errors import StructureError, UnsupportedError, short_repr
from ..kernels.low_rank import core_dtype
from ..variants import ArrowConfig
from .alike import check_adapter
from .combine_forms import as_adapter
from .low_rank_update import exactly, low_rank_update

__all__ = ["arrow"]

Pair = tuple[Tensor, Tensor]
"""A (r, d_in) and B (d_out, r) of an update B A."""


def arrow(
    adapters: Iterable[Adapter],
    *,
    top_k: int = 3,
    temperature: float = 1.0,
    general: Iterable[Adapter] = (),
    subtract: Literal["update", "factors"] = "update",
) -> Adapter:
    """One adapter of several trained LoRAs, of which each token has those whose direction it is
    nearest to: `ll.apply(model, ll.arrow([p1, p2, p3], top_k=2), x)`. Nothing is trained for it.

    At each layer a token has the top_k experts whose directions it lies along most, weighted by a
    softmax of that. An expert's direction is the input that its update answers most to: the top
    right singular vector of B A, exactly. Ostapenko et al. 2024, arXiv 2405.11157.

    With `general` adapters their mean is taken out of each expert first, so that experts keep what
    is their own (GenKnowSub, ACL 2025, short papers 54).

    Args:
        adapters: of methods whose update is a pair of factors (LoRA and its kin), on the same
            linear layers; ranks and strengths may differ.
        top_k: how many experts each token has, at most their number.
        temperature: what the likenesses are divided by before the softmax.
        general: adapters of what all experts know, on the same layers.
        subtract: "update" takes the mean of the general updates s B A out of each expert's, which
            adds the general ranks to its own; "factors" is what PEFT does, A - mean(A) and B -
            mean(B), which is another thing, and needs equal ranks.

    Raises:
        StructureError: no adapters, a stack, layers that aren't the same or unlike sizes.
        UnsupportedError: a method without factors, a site that isn't a linear layer, or ranks that
            differ where factors are subtracted.
        ConfigError: top_k or temperature out of range.
    """
    if not isinstance(subtract, str) or subtract not in ("update", "factors"):
        raise StructureError(
            f"arrow: subtract: expected 'update' or 'factors', found {short_repr(subtract)}"
        )
    experts, others = _checked(adapters, "number"), _checked(general, "general number")
    if not experts:
        raise StructureError("arrow: expected at least one adapter, found none")
    sites = experts[0].sites
    for i, adapter in enumerate((*experts, *others)):
        which = f"number {i}" if i < len(experts) else f"general number {i - len(experts)}"
        _check_sites(sites, adapter, which)
    with exactly((*experts, *others)):
        made = {path: _at(path, experts, others, subtract) for path in sites}
    return as_adapter(
        ArrowConfig, sites, made, experts=len(experts), top_k=top_k, temperature=temperature
    )


def _checked(adapters: Any, which: str) -> list[Adapter]:
    if isinstance(adapters, Adapter) or not isinstance(adapters, Iterable):
        raise StructureError(
            f"arrow: expected a sequence of adapters, found {type(adapters).__name__}"
        )
    several = list(adapters)
    for i, adapter in enumerate(several):
        check_adapter(adapter, f"arrow: {which} {i}")
        check_shapes(adapter)
    return several


def _check_sites(sites: Any, adapter: Adapter, which: str) -> None:
    """Refuse an adapter on other layers than the first, or on what isn't a linear layer."""
    odd = sites.keys() ^ adapter.sites.keys()
    if odd:
        raise StructureError(
            f"arrow: {min(odd)!r} isn't adapted by both number 0 and {which}; each token chooses "
            f"among all experts, so they have the same sites"
        )
    for path, site in adapter.sites.items():
        if site.kind != "linear":
            raise UnsupportedError(
                f"arrow: {path!r} is of kind {site.kind!r}; tokens are routed at linear layers "
                f"alone"
            )
        if (site.d_in, site.d_out) != (sites[path].d_in, sites[path].d_out):
            raise StructureError(
                f"arrow: {path!r} is {sites[path].d_in} -> {sites[path].d_out} in number 0, "
                f"{site.d_in} -> {site.d_out} in {which}"
            )


def _at(
    path: str, experts: Sequence[Adapter], general: Sequence[Adapter], subtract: str
) -> dict[str, Tensor]:
    """The tensors of a site: experts padded to one rank, and their directions."""
    pairs = [low_rank_update(adapter, path, "arrow") for adapter in experts]
    shared = [low_rank_update(adapter, path, "arrow") for adapter in general]
    if not shared:
        updates = [(A, B * s) for A, B, s in pairs]
    elif subtract == "update":
        mean_A = torch.cat([A for A, _, _ in shared])
        mean_B = torch.cat([B * (s / len(shared)) for _, B, s in shared], dim=-1)
        updates = [(torch.cat([A, mean_A]), torch.cat([B * s, -mean_B], -1)) for A, B, s in pairs]
    else:
        ranks = sorted({A.shape[0] for A, _, _ in (*pairs, *shared)})
        if len(ranks) > 1:
            raise UnsupportedError(
                f"arrow: {path!r}: factors can't be subtracted from those of another rank, found "
                f"ranks {', '.join(map(str, ranks))}; take subtract='update'"
            )
        mean_A = torch.stack([A for A, _, _ in shared]).mean(0)
        mean_B = torch.stack([B for _, B, _ in shared]).mean(0)
        updates = [(A - mean_A, (B - mean_B) * s) for A, B, s in pairs]
    r = max(A.shape[0] for A, _ in updates)
    return {
        "lora_A": torch.stack([F.pad(A, (0, 0, 0, r - A.shape[0])) for A, _ in updates]),
        "lora_B": torch.stack([F.pad(B, (0, r - B.shape[1])) for _, B in updates]),
        "lora_proto": torch.stack([_direction(*update) for update in updates]),
    }


def _direction(A: Tensor, B: Tensor) -> Tensor:
    """The top right singular vector of B A, (d_in,), by the decomposition of an r x r core; zero
    where there is no update.
    """
    core = core_dtype(A.dtype)
    Q, R = torch.linalg.qr(A.detach().to(core).mT)  # A^T = Q R, Q (d_in, k)
    left = torch.linalg.qr(B.detach().to(core), mode="r").R  # (k', r)
    _, S, Vh = torch.linalg.svd(left @ R.mT)
    return (Q @ Vh[0] * (S[0] > 0)).to(A.dtype)
