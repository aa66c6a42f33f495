"""The modules of a model that a config may choose from, before its patterns choose."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ..core.config import AdapterConfig
from ..core.errors import TargetError, UnsupportedError, nearest, short_repr
from ..core.method import Variant
from .kinds import KINDS, Kind
from .patterns import elsewhere, words_for

__all__ = ["Candidate", "candidates", "wanted_kinds"]


class Candidate(NamedTuple):
    """A place that may be chosen.

    Attributes:
        path: the path of the place.
        kind: the kind of the place.
        module: the module that holds it.
        name: the name of the tensor in that module.
        uncalled: whether the module is never called.
    """

    path: str
    kind: Kind
    module: Any
    name: str = "weight"
    uncalled: bool = False


def wanted_kinds(variant: Variant, cfg: AdapterConfig) -> list[Kind]:
    """The kinds of module that are candidates.

    Raises:
        TargetError: an unknown kind, or a method of bare parameters of which none is named.
        UnsupportedError: a kind that the method can't adapt.
    """
    for name in cfg.target_kinds:
        known = [kind for kind, row in KINDS.items() if not row.bare]
        if name not in known:
            bare = " (name parameters in target_parameters)" if name in KINDS else ""
            raise TargetError(
                f"target_kinds: unknown kind {name!r}{bare}; "
                f"{nearest(name, known, first=len(known))}"
            )
        if name not in variant.sites:
            raise UnsupportedError(
                f"target_kinds: {variant.name} adapts {', '.join(variant.sites)}, this asks for "
                f"{name!r}"
            )
    if cfg.target_kinds:
        return [KINDS[name] for name in dict.fromkeys(cfg.target_kinds)]
    if cfg.target_parameters and not cfg.target_names:
        return []
    odd = [name for name in variant.sites if name not in KINDS]
    if odd:
        raise UnsupportedError(
            f"{variant.name} says that it adapts {short_repr(odd[0])}; "
            f"{nearest(str(odd[0]), KINDS, first=len(KINDS))}"
        )
    default = next((name for name in variant.sites if not KINDS[name].bare), None)
    if default is None:
        raise TargetError(
            f"{variant.name} adapts bare parameters alone; name them in target_parameters"
        )
    return [KINDS[default]]


def candidates(model: nn.Module, cfg: AdapterConfig, kinds: list[Kind]) -> list[Candidate]:
    """The modules of these kinds, in model order.

    Raises:
        TargetError: there is none.
    """
    found = [
        (path, module, next((kind for kind in kinds if kind.holds(module)), None))
        for path, module in model.named_modules()
    ]
    listed = {
        id(member)
        for _, module, _ in found
        if isinstance(module, nn.ModuleList)
        for member in module
    }
    uncalled = {
        id(module.out_proj) for _, module, _ in found if isinstance(module, nn.MultiheadAttention)
    }
    kept = [
        Candidate(path, kind, module, "weight", id(module) in uncalled)
        for path, module, kind in found
        if kind is not None and (cfg.target_names or not kind.listed or id(module) in listed)
    ]
    if not cfg.target_names:
        kept = _outermost(kept)
    if not kept:
        what = words_for(kinds)
        if kinds == [KINDS["linear"]]:
            what = "linear-like module (in_features, out_features, weight, a call)"
        raise TargetError(
            f"{type(model).__name__} has no {what}{elsewhere(model, cfg.target_names, kinds)}"
        )
    return kept


def _outermost(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates without those whose whole call is inside another's."""
    kept: list[Candidate] = []
    outer: list[str] = []
    for candidate in candidates:
        inside = any(not path or candidate.path.startswith(f"{path}.") for path in outer)
        if candidate.kind.called and not inside:
            outer.append(candidate.path)
        if not (candidate.kind.called and inside):
            kept.append(candidate)
    return kept
