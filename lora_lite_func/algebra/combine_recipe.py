"""How the factors of several adapters at one site become one pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..core.arguments import number, whole
from ..core.errors import StructureError, short_repr
from ..core.random import generator
from ..core.site import Site
from ..core.torch_internals import outside_transforms

__all__ = ["How", "Recipe"]

How = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


class Recipe:
    """How the factors at one site become a pair."""

    def __init__(
        self, how: str, r: int | None, density: float, majority_sign: str, seed: int
    ) -> None:
        if not isinstance(how, str) or how not in get_args(How):
            raise StructureError(
                f"combine_adapters: expected one of {', '.join(get_args(How))}, found "
                f"{short_repr(how)}"
            )
        if not isinstance(density, float):
            number(density, "combine_adapters: density")
        whole(seed, "combine_adapters: seed")
        if not 0.0 < density <= 1.0:
            raise StructureError(f"combine_adapters: expected a density in (0, 1], found {density}")
        if not isinstance(majority_sign, str) or majority_sign not in ("total", "frequency"):
            raise StructureError(
                f"combine_adapters: majority_sign: expected 'total' or 'frequency', found "
                f"{short_repr(majority_sign)}"
            )
        self.name, self.dense = how.removesuffix("_svd"), how.endswith("svd")
        self.r, self.density, self.majority_sign, self.seed = r, density, majority_sign, seed

    def at(
        self, site: Site, parts: Sequence[tuple[Any, Tensor, Tensor, float]], widest: int
    ) -> tuple[Tensor, Tensor]:
        """(A (r, d_in), B (d_out, r)) of (weight, A_i, B_i, s_i); `widest` is the rank of the svd
        forms where none was given.

        Raises:
            StructureError: ranks differ where factors are added one by one.
        """
        if self.name == "cat":
            return torch.cat([A for _, A, _, _ in parts], dim=-2), torch.cat(
                [(B * (w * s)).to(B.dtype) for w, _, B, s in parts], dim=-1
            )
        weights = [w for w, _, _, _ in parts]
        if self.dense:
            core = torch.promote_types(parts[0][1].dtype, torch.float32)
            updates = [s * (B.to(core) @ A.to(core)) for _, A, B, s in parts]  # (d_out, d_in) each
            whole = (
                _weighted(updates, weights)
                if self.name == "svd"
                else self._merged(updates, weights, site.path, "update")
            )
            return self._split(whole, widest, parts[0][1].dtype)
        ranks = sorted({A.shape[-2] for _, A, _, _ in parts})
        if len(ranks) > 1:
            raise StructureError(
                f"combine_adapters: {site.path!r} has ranks {ranks}; {self.name!r} adds factor "
                f"by factor, take 'cat'"
            )
        roots = [abs(w * s) ** 0.5 for w, _, _, s in parts]
        signed = [_signed(root, w * s) for root, (w, _, _, s) in zip(roots, parts, strict=True)]
        A = self._merged([A for _, A, _, _ in parts], signed, site.path, "A")
        return A, self._merged([B for _, _, B, _ in parts], roots, site.path, "B")

    def _merged(
        self, tensors: Sequence[Tensor], weights: Sequence[Any], path: str, what: str
    ) -> Tensor:
        """The weighted sum of tensors, pruned and by elected signs as the name says."""
        if self.name in ("magnitude_prune", "ties"):
            tensors = [_largest(t, self.density) for t in tensors]
        if self.name in ("dare_linear", "dare_ties"):
            tensors = [self._dropped(t, path, f"{what} {i}") for i, t in enumerate(tensors)]
        return (
            _elected(tensors, weights, self.majority_sign)
            if self.name.endswith("ties")
            else _weighted(tensors, weights)
        )

    def _dropped(self, t: Tensor, path: str, what: str) -> Tensor:
        with outside_transforms():  # the seed decides what is drawn, even inside a transform
            own = generator(self.seed, path, what)
            draw = torch.rand(t.shape, generator=own, dtype=torch.float32).to(t.device)
        return t * (draw < self.density) / self.density

    def _split(self, whole: Tensor, widest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The best factors (r, d_in), (d_out, r)."""
        r = min(self.r or widest, *whole.shape[-2:])
        U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
        return Vh[..., :r, :].to(dtype), (U[..., :r] * S[..., None, :r]).to(dtype)


def _signed(root: Any, of: Any) -> Any:
    """The root, with the sign of the number that it is the root of."""
    if isinstance(of, Tensor):
        return torch.where(of >= 0, root, -root)
    return root if of >= 0 else -root


def _weighted(tensors: Sequence[Tensor], weights: Sequence[Any]) -> Tensor:
    return torch.stack([(w * t).to(t.dtype) for w, t in zip(weights, tensors, strict=True)]).sum(0)


def _largest(t: Tensor, density: float) -> Tensor:
    """The tensor with its largest entries kept and the rest set to zero."""
    keep = int(density * t.numel())
    mask = torch.zeros_like(t).flatten()
    mask[t.abs().flatten().topk(keep).indices] = 1
    return t * mask.view_as(t)


def _elected(tensors: Sequence[Tensor], weights: Sequence[Any], majority_sign: str) -> Tensor:
    """For each entry, the mean of those weighted values that have the elected sign."""
    several = torch.stack(list(tensors))
    votes = several if majority_sign == "total" else several.sign()
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    agree = several.sign() == elected
    factor = torch.stack([torch.as_tensor(w).to(several) for w in weights])
    factor = factor.view(-1, *[1] * (several.ndim - 1))
    return (several * factor * agree).sum(0) / agree.sum(0).clamp(min=1)
