"""How a token is shared out among experts, and how evenly experts are used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.arguments import whole
from ..core.errors import StructureError
from .low_rank import core_dtype

__all__ = ["gates", "load_balance", "probabilities"]


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature) over the last axis, float32 at least."""
    return (logits.to(core_dtype(logits.dtype)) / temperature).softmax(-1)


def gates(logits: Tensor, top_k: int | None, temperature: float) -> Tensor:
    """How much of each expert a token has, float32 at least: `probabilities` of all experts, or of
    the top_k with the largest logits alone, and zero for the others.

    Args:
        logits: (..., E).
        top_k: how many experts a token has; None for all.
        temperature: what logits are divided by.
    """
    if top_k is None or top_k >= logits.shape[-1]:
        return probabilities(logits, temperature)
    best = logits.topk(top_k, dim=-1)
    chosen = probabilities(best.values, temperature)  # (..., top_k)
    return torch.zeros_like(logits, dtype=chosen.dtype).scatter(-1, best.indices, chosen)


def load_balance(
    router: Tensor | Mapping[str, Tensor], *, top_k: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """How unevenly tokens are shared out among E experts, (): E sum over e of f_e p_e, averaged
    over layers; add it to the loss, times 0.01 or so. It is 1 where experts are used evenly.

    p_e is the mean over tokens of expert e's probability. With `top_k`, f_e is the share of the
    tokens' choices that went to e (the loss of Switch Transformers, Fedus, Zoph and Shazeer 2021,
    arXiv 2101.03961, at top_k=1); without it each token goes to each expert as much as the router
    says, f_e = p_e.

    Args:
        router: probabilities (..., E), of one layer or of several by path, as `ll.collect` gives
            them.
        top_k: how many experts each token has; None for all.
        mask: nonzero for the tokens that count, shaped like the probabilities without E.

    Raises:
        StructureError: no layer, a mask of another shape, or top_k beyond the number of experts.
    """
    layers = dict(router) if isinstance(router, Mapping) else {"": router}
    if top_k is not None:
        top_k = whole(top_k, "load_balance: top_k")
    if not layers:
        raise StructureError("load_balance: expected the probabilities of a layer, found none")
    return torch.stack([_balance(path, p, top_k, mask) for path, p in layers.items()]).mean()


def _balance(path: str, p: Tensor, top_k: int | None, mask: Tensor | None) -> Tensor:
    """E sum over e of f_e p_e, of one layer."""
    if not isinstance(p, Tensor) or not p.ndim:
        found = tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__
        raise StructureError(
            f"load_balance: {path!r}: expected probabilities (..., E), found {found}"
        )
    if mask is not None and not isinstance(mask, Tensor):
        raise StructureError(f"load_balance: expected a mask, found {type(mask).__name__}")
    experts = p.shape[-1]
    if top_k is not None and not 1 <= top_k <= experts:
        raise StructureError(
            f"load_balance: {path!r}: expected top_k from 1 to {experts}, the number of experts, "
            f"found {top_k}"
        )
    if mask is not None and mask.shape != p.shape[:-1]:
        raise StructureError(
            f"load_balance: {path!r}: expected a mask {tuple(p.shape[:-1])}, one entry for each "
            f"token, found {tuple(mask.shape)}"
        )
    share = _mean(p, mask)  # (E,)
    if top_k is None:
        return experts * (share * share).sum()
    chosen = torch.zeros_like(p).scatter(-1, p.topk(top_k, dim=-1).indices, 1.0 / top_k)
    return experts * (_mean(chosen, mask) * share).sum()


def _mean(p: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over tokens, (E,)."""
    p = p.reshape(-1, p.shape[-1])
    if mask is None:
        return p.mean(0)
    w = (mask != 0).reshape(-1, 1).to(p)
    return (p * w).sum(0) / w.sum().clamp(min=1.0)
