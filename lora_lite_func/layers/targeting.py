"""From a model and a config to sites: which modules and parameters a config adapts.

What counts is structure: a linear-like layer needn't be an nn.Linear. candidates.py has the modules
that may be chosen at all.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from ..core.config import DEFAULT_EXCLUDE, LORA_LITE_EXCLUDE, AdapterConfig, dropout_of
from ..core.errors import TargetError, UnsupportedError
from ..core.method import Variant, site_for
from ..core.site import Site
from .candidates import Candidate, candidates, wanted_kinds
from .kinds import KINDS, Facts, Kind, facts
from .patterns import check_patterns, chosen_layers, nothing_left, words_for
from .refusals import check_model, refuse_uncopyable
from .roles import layer_index, residual_width, role_of
from .sharded import ADAPTED_ITSELF, check_parallel
from .weights import is_packed, stored

__all__ = ["Found", "find"]


Found = list[tuple[Site, nn.Module]]
"""Sites with the modules that hold them, as `find` gives them."""


def find(model: nn.Module, variant: Variant, cfg: AdapterConfig) -> Found:
    """The sites of a config, with the modules that hold them: modules in the order of
    `model.named_modules()`, then parameters.

    Raises:
        TargetError: a pattern, role or layer index selects nothing, or nothing is left.
        UnsupportedError: the method can't adapt a chosen place, or the model is no module, or a
            wrapper that hides its modules.
    """
    check_model(model)
    refuse_uncopyable(model)
    kinds, width = wanted_kinds(variant, cfg), residual_width(model)
    chosen = _chosen_modules(model, cfg, kinds, width) if kinds else []
    parameters = _chosen_parameters(model, cfg)
    _check_once(chosen, parameters)
    chosen += parameters
    words = words_for({candidate.kind.name: candidate.kind for candidate in chosen}.values())
    for what in ("rank_pattern", "alpha_pattern"):
        check_patterns(
            what,
            [p for p, _ in getattr(cfg, what)],
            [candidate.path for candidate in chosen],
            words,
        )
    scale_tensors: dict[float, Tensor] = {}
    return [
        (_site(variant, cfg, candidate, width, scale_tensors), candidate.module)
        for candidate in chosen
    ]


def _chosen_modules(
    model: nn.Module, cfg: AdapterConfig, kinds: list[Kind], width: int
) -> list[Candidate]:
    """The candidates that names, exclusions, layers and roles leave.

    Raises:
        TargetError: one of those selects nothing, or nothing is left.
    """
    among, words = candidates(model, cfg, kinds), words_for(kinds)
    paths = [candidate.path for candidate in among]
    check_patterns("target_names", cfg.target_names, paths, words, model, kinds)
    needless = (*DEFAULT_EXCLUDE, *LORA_LITE_EXCLUDE)
    written = [p for p in cfg.exclude_names if p not in needless]
    check_patterns("exclude_names", written, paths, words)
    layers = chosen_layers(cfg, paths, words)
    matches = [re.compile(p).search for p in cfg.target_names]
    chosen = [
        candidate
        for candidate in among
        if (not matches or any(match(candidate.path) for match in matches))
        and not _excluded(candidate, cfg)
        and (layers is None or layer_index(candidate.path) in layers)
        and (
            not cfg.target_roles
            or role_of(candidate.path, candidate.kind.size(candidate.module), width)
            in cfg.target_roles
        )
    ]
    if not chosen:
        raise TargetError(nothing_left(cfg, paths, words))
    return chosen


def _excluded(candidate: Candidate, cfg: AdapterConfig) -> bool:
    """Whether the user's patterns leave it out, or the defaults that are meant for its kind."""
    patterns = (
        p for p in cfg.exclude_names if p not in DEFAULT_EXCLUDE or p in candidate.kind.hides
    )
    return any(re.search(p, candidate.path) for p in patterns)


def _chosen_parameters(model: nn.Module, cfg: AdapterConfig) -> list[Candidate]:
    if not cfg.target_parameters:
        return []
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for what in ("target_parameters", "transposed_parameters"):
        check_patterns(what, getattr(cfg, what), names, "parameters")
    user = [p for p in cfg.exclude_names if p not in DEFAULT_EXCLUDE]
    chosen: dict[int, Candidate] = {}
    for path in names:
        if any(re.search(p, path) for p in cfg.target_parameters) and not any(
            re.search(p, path) for p in user
        ):
            parent, _, name = path.rpartition(".")
            tensor: Any = modules[parent]._parameters[name]
            chosen.setdefault(
                id(tensor),
                Candidate(
                    path, KINDS["vector" if tensor.ndim < 2 else "parameter"], modules[parent], name
                ),
            )
    if not chosen:
        raise TargetError(
            f"exclude_names leaves none of the parameters that "
            f"target_parameters={cfg.target_parameters!r} selects"
        )
    return list(chosen.values())


def _check_once(modules: list[Candidate], parameters: list[Candidate]) -> None:
    weights = {
        (id(candidate.module), name): candidate.path
        for candidate in modules
        for name in ("weight", "bias")
        if not candidate.kind.whole
    }
    for candidate in parameters:
        twice = weights.get((id(candidate.module), candidate.name))
        if twice is not None:
            raise TargetError(
                f"{candidate.path!r} is named by target_parameters, and belongs to the site "
                f"{twice!r}; choose one of the two"
            )


def _site(
    variant: Variant,
    cfg: AdapterConfig,
    candidate: Candidate,
    width: int,
    scale_tensors: dict[float, Tensor],
) -> Site:
    path, kind, module, name, _ = candidate
    _check_adaptable(variant, cfg, candidate)
    transposed = any(re.search(p, path) for p in cfg.transposed_parameters)
    if kind.listed:  # the hidden state's width: a linear layer says its own
        wide = (KINDS["linear"].size(module) or (0, width))[1]
        found = Facts(wide, wide)
    else:
        found = facts(kind, module, name, transposed)
    if found.d_in < 1 or found.d_out < 1:
        raise UnsupportedError(
            f"{path!r}: this {type(module).__name__} is {found.d_in} -> {found.d_out}; call a "
            f"lazy model once so that it has its sizes, or leave the layer out with exclude_names"
        )
    bias = not kind.bare and isinstance(stored(module, "bias"), Tensor)
    at = Site(
        path,
        found.d_in,
        found.d_out,
        bias,
        kind.name,
        cfg.rank_at(path),
        cfg.alpha_at(path),
        1.0,
        *found[2:],
    )
    return site_for(variant, cfg, at, scale_tensors)


def _check_adaptable(variant: Variant, cfg: AdapterConfig, candidate: Candidate) -> None:
    """Refuse a place that the method can't adapt, or not with this config.

    Raises:
        UnsupportedError: another kind, a packed or complex tensor, or dropout where there is no
            branch.
    """
    path, kind, module, name, _ = candidate
    if kind.name not in variant.sites:
        this = "a linear layer" if kind.name == "linear" else f"of kind {kind.name!r}"
        raise UnsupportedError(
            f"{path!r}: {variant.name} adapts {', '.join(variant.sites)}, this is {this}"
        )
    if not kind.whole:
        called = kind.name == "linear" and not candidate.uncalled
        check_parallel(module, path, name, None if called else ADAPTED_ITSELF)
    if kind.bare and is_packed(module._parameters[name]):
        raise UnsupportedError(
            f"{path!r} is packed ({module._parameters[name].dtype}): adapt its layer "
            f"(target_names), whose call unpacks it"
        )
    tensor = None if kind.whole else module._parameters.get(name)
    if tensor is not None and tensor.is_complex():
        raise UnsupportedError(
            f"{path!r}: its {name} is complex, and adapters are real; leave it out with "
            f"exclude_names"
        )
    by_call = kind.whole or not (
        kind.bare
        or kind.one_hot
        or (kind.by_weight is not None and kind.by_weight(module))
        or candidate.uncalled
    )
    dropout = dropout_of(cfg)
    if dropout and not by_call:
        raise UnsupportedError(
            f"{path!r}: {dropout} acts on features that come to a layer's call, and this "
            f"{kind.one} is adapted without; set {dropout}=0"
        )
