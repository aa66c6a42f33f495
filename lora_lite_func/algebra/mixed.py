"""A weighted sum of a stack's updates for each row of a batch, as a value that `ll.apply` takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core.adapter import Adapter, count_members
from ..core.errors import StructureError, UnsupportedError, nearest
from ..core.nodes import register_node
from ..kernels.mixture import Mixture, MixtureBySite

__all__ = ["Mixed", "mixed"]

Weights: TypeAlias = Tensor | Sequence[Any]
"""(N, K), or (N, T, K)."""


class Mixed:
    """A stack of adapters and how much of each of them each row of a batch has, or each token. A
    pytree node around the stack and the weights.

    Attributes:
        stack: the adapters, every leaf (K, ...).
        weights: (N, K) or (N, T, K); or a dict of these by site.
    """

    __slots__ = ("stack", "weights")

    def __init__(self, stack: Adapter, weights: Tensor | Mapping[str, Tensor]) -> None:
        self.stack, self.weights = stack, weights

    def mixture(self) -> Mixture | MixtureBySite:
        """The weights, as sites take them."""
        if isinstance(self.weights, Mapping):
            return MixtureBySite(self.weights, next(iter(self.weights.values())).shape[-1])
        return Mixture(self.weights)

    def __repr__(self) -> str:
        first, where = self.weights, ""
        if isinstance(first, Mapping):
            first, where = next(iter(first.values())), " at each site"
        return f"Mixed(weights of shape {tuple(first.shape)}{where})\n{self.stack!r}"


def mixed(stack: Adapter, weights: Weights | Mapping[str, Weights]) -> Mixed:
    """Each row of a batch, or each token, its own weighted sum of a stack's updates:
    `ll.apply(model, ll.mixed(stack, w), x)`.

    At each adapted layer y' = y + sum over k of w_k u_k(x), where u_k(x) is what member k adds
    there. `ll.rows` is the case of one-hot weights, and weights of zero are the bare base.
    Gradients reach the weights and the stack. Weights of a router (X-LoRA, arXiv 2402.07148) or of
    soft tasks (Poly, arXiv 2202.13914) are a tensor like any other.

    For methods whose phases add to the layer's output something that doesn't depend on it. Low-rank
    ones take two products at each layer, the others one pass for each member.

    Args:
        stack: what `ll.stack` gave.
        weights: floating (N, K), for each row the weights of the K members; or (N, T, K), for each
            token, where every site's input is (N, T, features). Nested sequences are taken too. Or
            {path: weights}, of their own for every site.

    Raises:
        StructureError: not a stack, weights of another shape or of no real numbers, or by other
            paths than the stack's sites.
        UnsupportedError: what the method's members do can't be summed at the layer's output.
    """
    count = count_members(stack, "mixed")
    if isinstance(weights, Mapping):
        odd = sorted(weights.keys() ^ stack.keys(), key=str)
        if odd:
            raise StructureError(
                f"mixed: expected weights for every site, differing: {odd[0]!r}; "
                f"{nearest(str(odd[0]), stack)}"
            )
        given: Any = {p: _checked(weights[p], count, f"mixed: {p!r}") for p in stack}
    else:
        given = _checked(weights, count, "mixed")
    variant = stack.layout.variant
    if not variant.adds:
        raise UnsupportedError(
            f"mixed: what {variant.name} does isn't a sum at the layer's output, so there is no "
            f"weighted sum of its members; give each row one of them (ll.rows), or average their "
            f"tensors (ll.mean)"
        )
    return Mixed(stack, given)


def _checked(weights: Weights, count: int, where: str) -> Tensor:
    """Weights as a tensor, (N, K) or (N, T, K)."""
    try:
        weights = torch.as_tensor(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        raise StructureError(f"{where}: expected weights (N, {count}), found {error}") from None
    if not weights.is_floating_point() and not weights.is_complex():
        weights = weights.to(torch.get_default_dtype())
    if weights.ndim not in (2, 3) or weights.shape[-1] != count or weights.is_complex():
        raise StructureError(
            f"{where}: expected weights (N, {count}) or (N, T, {count}), one for each member, "
            f"found {weights.dtype} of shape {tuple(weights.shape)}"
        )
    return weights


def _flatten(value: Mixed) -> tuple[list[Any], None]:
    return [value.stack, value.weights], None


def _unflatten(children: Iterable[Any], _: None) -> Mixed:
    return Mixed(*children)


register_node(Mixed, _flatten, _unflatten)
