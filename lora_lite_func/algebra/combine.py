"""Several adapters made into one: exact sums, and PEFT's merges by factor, by sign, by size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, overload

from torch import Tensor

from ..core.adapter import Adapter
from ..core.adapter_shapes import check_shapes
from ..core.arguments import items
from ..core.errors import StructureError, UnsupportedError, short_repr
from ..core.registry import variant_for
from ..core.shared import site_tensors
from ..core.site import Site
from ..variants import LoRAConfig
from .alike import check_adapter
from .combine_forms import FORMS, Weighted, as_adapter, combined_form
from .combine_recipe import How, Recipe
from .low_rank_update import exactly, low_rank_update

__all__ = ["add", "combine_adapters"]


@overload
def combine_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float | Tensor] | Tensor | None = None,
    how: How = "cat",
    *,
    r: int | None = None,
    density: float = 0.5,
    majority_sign: Literal["total", "frequency"] = "total",
    seed: int = 0,
) -> Adapter: ...


@overload
def combine_adapters(
    adapters: Sequence[Sequence[Adapter]],
    weights: Sequence[float | Tensor] | Tensor | None = None,
    how: How = "cat",
    *,
    r: int | None = None,
    density: float = 0.5,
    majority_sign: Literal["total", "frequency"] = "total",
    seed: int = 0,
) -> tuple[Adapter, ...]: ...


def combine_adapters(
    adapters: Sequence[Adapter] | Sequence[Sequence[Adapter]],
    weights: Sequence[float | Tensor] | Tensor | None = None,
    how: How = "cat",
    *,
    r: int | None = None,
    density: float = 0.5,
    majority_sign: Literal["total", "frequency"] = "total",
    seed: int = 0,
) -> Adapter | tuple[Adapter, ...]:
    """One LoRA adapter of several low-rank ones. Pure; the names and definitions are those of
    PEFT's `add_weighted_adapter`.

    With D_i = s_i B_i A_i the update of adapter i, w_i its weight:

        cat      sum_i w_i D_i, exactly: the factors side by side, of rank sum_i r_i. The default.
        svd      its best approximation of rank r.
        linear   factor by factor, A = sum_i +-sqrt|w_i s_i| A_i and B likewise. It has cross
                 terms, and ranks must be equal.
        magnitude_prune   each tensor keeps its largest entries (a part `density`), then as linear.
        dare_linear       each keeps entries at random, divided by density (Yu et al. 2023, arXiv
                          2311.03099), then as linear.
        ties              magnitude_prune, and where signs differ the mean of those with the
                          elected sign (Yadav et al. 2023, arXiv 2306.01708).
        dare_ties         dare's pruning, ties' election.
        *_svd             the same on the D_i themselves, then the best approximation of rank r.

    IA3's gates are combined into gates: linear is PEFT's sum_i w_i g_i, cat the gate of the summed
    changes, 1 + sum_i w_i (g_i - 1). HiRA's products by cat, into one of rank sum_i r_i.

    Args:
        adapters: of methods whose update is a product of two factors (LoRA, EVA, PiSSA, OLoRA,
            ASVD, CorDA, LoRA-GA, AdaLoRA, DeLoRA), also different ones; or of IA3; or of HiRA. A
            site that some lack is theirs alone. Each may be a tuple, as a file with several parts
            is read: then a tuple comes, one adapter for all that is low-rank, one for each other
            method.
        weights: one per adapter, numbers or tensors (); all 1 by default. Negative ones subtract. A
            tensor (n,) of them is differentiable, and may be mapped: "cat", "svd" and, where none
            is zero, "linear".
        how: as above.
        r: rank of the svd forms; by default the largest of all adapters and sites.
        density: part of the entries that pruning keeps, in (0, 1].
        majority_sign: whether sizes ("total") or counts ("frequency") elect the sign.
        seed: the seed of dare's draws, which depend on (seed, path, number of the adapter) alone.

    Raises:
        StructureError: no adapters, a stack, weights that don't fit, an unknown way or sign, a
            density or rank out of range, ranks that differ where they may not, or sites that do.
        UnsupportedError: a method that can't be combined, or not in this way, or several methods
            that don't make one adapter.
    """
    adapters = items(adapters, "combine_adapters", "adapters")
    nested: list[Sequence[Any]] = [
        [given] if isinstance(given, Adapter) or not isinstance(given, (tuple, list)) else given
        for given in adapters
    ]
    numbers = _numbers(len(nested), weights)
    recipe = Recipe(how, _rank(r), density, majority_sign, seed)
    forms: dict[Any, list[tuple[Any, Adapter]]] = {}
    for i, parts in enumerate(nested):
        for adapter in parts:
            check_adapter(adapter, f"combine_adapters: number {i}")
            check_shapes(adapter)
            config = type(adapter.config)
            forms.setdefault(config if config in FORMS else LoRAConfig, []).append(
                (numbers[i], adapter)
            )
    with exactly(adapter for group in forms.values() for _, adapter in group):
        made = tuple(
            _combined_low_rank(recipe, group)
            if config is LoRAConfig
            else combined_form(config, how, _weighted_tensors(group))
            for config, group in forms.items()
        )
    if any(isinstance(given, (tuple, list)) for given in adapters):
        return made
    if len(made) > 1:
        names = ", ".join(variant_for(config).name for config in forms)
        raise UnsupportedError(
            f"combine_adapters: {names} don't make one adapter; combine each by itself, or apply "
            f"them side by side, ll.apply(model, (p1, p2), x)"
        )
    return made[0]


def _by_site(
    group: Sequence[tuple[Any, Adapter]],
) -> Iterator[tuple[str, Site, list[tuple[Any, Adapter]]]]:
    """(path, site, (weight, adapter) of all that adapt it), of each site that one adapts."""
    for path in dict.fromkeys(path for _, adapter in group for path in adapter):
        there = [(w, adapter) for w, adapter in group if path in adapter]
        yield path, _common_site([adapter.sites[path] for _, adapter in there]), there


def _weighted_tensors(group: Sequence[tuple[Any, Adapter]]) -> dict[str, Weighted]:
    """{path: (weight, tensors, site) of all that adapt it}."""
    return {
        path: [(w, site_tensors(a.layout.shared, a._data, path), a.sites[path]) for w, a in there]
        for path, _, there in _by_site(group)
    }


def _combined_low_rank(recipe: Recipe, group: Sequence[tuple[Any, Adapter]]) -> Adapter:
    """One LoRA adapter made of adapters whose updates are pairs of factors."""
    sites: dict[str, Site] = {}
    pairs: dict[str, list[tuple[Any, Tensor, Tensor, float]]] = {}
    for path, site, there in _by_site(group):
        sites[path] = site
        pairs[path] = [
            (w, *low_rank_update(adapter, path, "combine_adapters")) for w, adapter in there
        ]
    widest = max(A.shape[-2] for parts in pairs.values() for _, A, _, _ in parts)
    made = {path: recipe.at(sites[path], parts, widest) for path, parts in pairs.items()}
    return as_adapter(
        LoRAConfig, sites, {path: {"lora_A": A, "lora_B": B} for path, (A, B) in made.items()}
    )


def _numbers(count: int, weights: Any) -> list[Any]:
    """One weight for each adapter.

    Raises:
        StructureError: no adapters, or another number of weights, or one that isn't finite.
    """
    if not count:
        raise StructureError("combine_adapters: expected at least one adapter, found none")
    numbers = [1.0] * count if weights is None else _weights(weights)
    if len(numbers) != count:
        raise StructureError(f"combine_adapters: expected {count} weights, found {len(numbers)}")
    return numbers


def _rank(r: Any) -> int | None:
    if r is not None and (not isinstance(r, int) or isinstance(r, bool) or r < 1):
        raise StructureError(f"combine_adapters: r: expected at least 1, found {short_repr(r)}")
    return r


def _weights(values: Any) -> list[Any]:
    """The weights, tensors as they are: their values may be data of a graph."""
    if not isinstance(values, Iterable):
        raise StructureError(
            f"combine_adapters: expected a sequence of weights, found {short_repr(values)}"
        )
    if isinstance(values, Tensor):
        if values.ndim != 1 or not values.is_floating_point():
            raise StructureError(
                f"combine_adapters: expected weights (n,), found {values.dtype} of shape "
                f"{tuple(values.shape)}"
            )
        return list(values.unbind())
    return [_weight(w) for w in values]


def _weight(value: Any) -> float | Tensor:
    if isinstance(value, Tensor) and not value.ndim and value.is_floating_point():
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise StructureError(
            f"combine_adapters: expected finite weights, found {short_repr(value)}"
        )
    return number


def add(*adapters: Adapter) -> Adapter:
    """The sum of low-rank adapters' updates as one LoRA adapter: `combine_adapters(adapters)`,
    exact.

    Methods whose update isn't a product of two factors are applied side by side instead:
    `ll.apply(model, (p1, p2), x)`.

    Raises:
        StructureError, UnsupportedError: as `combine_adapters`.
    """
    return combine_adapters(adapters)


def _common_site(sites: Sequence[Site]) -> Site:
    first = sites[0]
    for other in sites:
        if (other.kind, other.d_in, other.d_out, other.num_experts) != (
            first.kind,
            first.d_in,
            first.d_out,
            first.num_experts,
        ):
            raise StructureError(
                f"combine_adapters: {first.path!r} is {first.kind} {first.d_in} -> {first.d_out} "
                f"in one, {other.kind} {other.d_in} -> {other.d_out} in another"
            )
    return first
