"""How much of each member of a stack each row of a batch has, or each token of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core.layout import Layout
from ..core.torch_internals import is_traced
from . import low_rank
from .row_axes import batch_axes, not_rows

__all__ = ["Mixture", "MixtureBySite", "add_mixture", "joined_B", "joined_factors"]


class Mixture:
    """The weights of a stack's members in each row's update, or in each token's.

    Attributes:
        weights: (N, members) or (N, T, members), floating; gradients reach them.
        members: how many adapters there are.
    """

    __slots__ = ("members", "weights")

    def __init__(self, weights: Tensor) -> None:
        self.weights, self.members = weights, weights.shape[-1]

    @property
    def by_token(self) -> bool:
        """Whether each token has weights, rather than each row."""
        return self.weights.ndim > 2

    def only(self, rows: Sequence[int]) -> Mixture:
        """The weights of some rows of the batch."""
        return Mixture(torch.stack([self.weights[row] for row in rows]))

    def at_site(self, layout: Layout, path: str, present: Tensor | None) -> Mixture:
        """The weights at a site, zero for members that lack it.

        Args:
            layout: the stack's.
            path: the site.
            present: (members,) 1 where a member has the site; None where all have it.
        """
        return self if present is None else Mixture(self.weights * present.to(self.weights))

    def at(self, x: Tensor, path: str) -> Tensor:
        """The weights for a site's input: (N, 1 ..., members), with as many dimensions as x has
        with its features, or as ids would have with those.

        Args:
            x: (N, ..., d_in), or ids (N, ...); where tokens have weights (N, T, ..., d_in).
            path: the path of the site, for the message.

        Raises:
            StructureError: the leading dimensions aren't those of the weights.
        """
        features, given = x.is_floating_point(), self.weights.shape[:-1]
        if not is_traced():
            if self.by_token:
                batch_axes(x, tuple(given), path, features)
            elif x.ndim < 1 + features or x.shape[0] != given[0]:
                raise not_rows(path, x, given[0])
        inner = x.ndim - features - len(given)
        return self.weights.to(x.device).view(*given, *[1] * inner, self.members)


class MixtureBySite:
    """Weights of a stack's members that differ by site.

    Attributes:
        weights: {path: as a `Mixture` has them}.
        members: how many adapters there are.
    """

    __slots__ = ("members", "weights")

    def __init__(self, weights: Mapping[str, Tensor], members: int) -> None:
        self.weights, self.members = weights, members

    @property
    def by_token(self) -> bool:
        """Whether each token has weights at every site, rather than each row."""
        return all(w.ndim > 2 for w in self.weights.values())

    def at_site(self, layout: Layout, path: str, present: Tensor | None) -> Mixture:
        """The weights at a site, as `Mixture.at_site` says."""
        return Mixture(self.weights[path]).at_site(layout, path, present)


def joined_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factor pairs A (K, r, d_in), B (K, d_out, r) as one, (K r, d_in) and (d_out, K r)."""
    return A.flatten(0, 1), joined_B(B)


def joined_B(B: Tensor) -> Tensor:
    """B (K, d_out, r) as (d_out, K r), the transpose of what lies in memory, as products with it
    have it.
    """
    return B.mT.flatten(0, 1).mT


def add_mixture(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float | Tensor, w: Tensor, fresh: bool = False
) -> Tensor:
    """y + sum over k of w_k s_k (x A_k^T) B_k^T: two products, whatever the number of members.

    Args:
        y: (..., d_out), what the branch is added to; the result has its dtype.
        x: (..., d_in), or ids (...) of an embedding.
        A: (K, r, d_in), or (r, d_in), one for all members.
        B: (K, d_out, r).
        s: a float, a scale for all members, or (K,).
        w: (..., K), which broadcasts over x's tokens.
        fresh: whether y may be written on.
    """
    members, _, r = B.shape
    if A.ndim == 2:
        h = low_rank.project(x, A).unsqueeze(-2)  # (..., 1, r)
        B = joined_B(B)
    else:
        A, B = joined_factors(A, B)
        h = low_rank.project(x, A).unflatten(-1, (members, r))  # (..., K, r)
    h = (h * (w * s).unsqueeze(-1)).to(h.dtype).flatten(-2)  # (..., K r)
    if fresh and h.dtype == y.dtype:
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, members * r), B.mT)
        return y
    return low_rank.expand(y, h, B)
