"""model + config -> sites: which layers a config adapts. Structural (a linear-like layer needn't be an nn.Linear)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .config import DEFAULT_EXCLUDE, AdapterConfig
from .errors import TargetError, UnsupportedError, nearest
from .layers import is_linear_like, refuse_uncopyable, stored
from .spec import Site, Variant, site_for

__all__ = ["find", "layer_index", "role_of"]

_WRITERS = (".o", ".o_proj", ".out_proj", ".attn.proj", ".down_proj", ".wo", ".output.dense")  # whole names, at a path's end


def find(model: nn.Module, variant: Variant, cfg: AdapterConfig) -> list[tuple[Site, nn.Module]]:
    """The sites of a config, with their modules, in the order of `model.named_modules()`.

    Raises:
        TargetError: a pattern, role or layer index selects nothing, or nothing is left.
        UnsupportedError: the method can't adapt a chosen layer, or the model is no module, or a wrapper that hides its modules.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"expected an nn.Module, found {type(model).__name__}")
    refuse_uncopyable(model)
    candidates = [(path, module) for path, module in model.named_modules() if is_linear_like(module)]
    if not candidates:
        raise TargetError(f"{type(model).__name__} has no linear-like module (in_features, out_features, weight, a call)")
    paths = [path for path, _ in candidates]
    _check_patterns("target_names", cfg.target_names, paths)
    _check_patterns("exclude_names", [p for p in cfg.exclude_names if p not in DEFAULT_EXCLUDE], paths)
    layers = _layers(cfg, paths)
    width = _residual_width(model, [m for _, m in candidates])
    chosen = [
        (path, module)
        for path, module in candidates
        if (not cfg.target_names or any(re.search(p, path) for p in cfg.target_names))
        and not any(re.search(p, path) for p in cfg.exclude_names)
        and (layers is None or layer_index(path) in layers)
        and (not cfg.target_roles or role_of(path, module, width) in cfg.target_roles)
    ]
    if not chosen:
        raise TargetError(_nothing_left(cfg, paths))
    for what in ("rank_pattern", "alpha_pattern"):
        _check_patterns(what, [p for p, _ in getattr(cfg, what)], [path for path, _ in chosen])
    twins: dict[float, Tensor] = {}
    return [(_site(variant, cfg, path, module, twins), module) for path, module in chosen]


def _site(variant: Variant, cfg: AdapterConfig, path: str, module: Any, twins: dict[float, Tensor]) -> Site:
    if "linear" not in variant.sites:
        raise UnsupportedError(f"{path!r}: {variant.name} adapts {', '.join(sorted(variant.sites))}, this is a linear layer")
    d_in, d_out = module.in_features, module.out_features
    if d_in < 1 or d_out < 1:
        raise UnsupportedError(
            f"{path!r}: this {type(module).__name__} is {d_in} -> {d_out}; call a lazy model once so that it has its sizes, "
            "or leave the layer out with exclude_names"
        )
    r, alpha, bias = cfg.rank_at(path), cfg.alpha_at(path), isinstance(stored(module, "bias"), Tensor)
    return site_for(variant, cfg, path, d_in, d_out, r=r, alpha=alpha, bias=bias, kind="linear", twins=twins)


def layer_index(path: str) -> int | None:
    """The first number in a path: 3 for "model.layers.3.mlp.up_proj"; None where there is none."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def role_of(path: str, module: Any, width: int) -> str:
    """By shape against the residual width, and by name where both sides have it: reader, writer or inner."""
    reads, writes = module.in_features == width, module.out_features == width
    if reads and writes:
        return "writer" if f".{path}".endswith(_WRITERS) else "reader"
    return "reader" if reads else "writer" if writes else "inner"


def _residual_width(model: nn.Module, linears: list[Any]) -> int:
    """The width of the residual stream: the model config's hidden size, else the commonest feature count."""
    config = getattr(model, "config", None)
    for holder in (config, getattr(config, "text_config", None)):
        for name in ("hidden_size", "d_model", "n_embd", "dim"):
            width = getattr(holder, name, None)
            if isinstance(width, int):
                return width
    sizes = [n for m in linears for n in (m.in_features, m.out_features)]
    return max(sizes, key=lambda n: (sizes.count(n), n))


def _check_patterns(what: str, patterns: Iterable[str], paths: list[str]) -> None:
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            hint = nearest(pattern, names)
            if not hint.startswith("did you mean"):
                hint = f"first ones: {', '.join(map(repr, paths[:3]))}"
            raise TargetError(f"{what}: {pattern!r} matched none of {len(paths)} linear-like layers; {hint}")


def _layers(cfg: AdapterConfig, paths: list[str]) -> set[int] | None:
    if cfg.layers is None:
        return None
    known = sorted({i for i in map(layer_index, paths) if i is not None})
    if not known:
        raise TargetError(f"layers: no linear-like layer has a number in its path; first ones: {', '.join(map(repr, paths[:3]))}")
    count = known[-1] + 1
    wanted = {i + count if i < 0 else i for i in cfg.layers}
    for i in cfg.layers:
        if (i + count if i < 0 else i) not in known:
            raise TargetError(f"layers: index {i} matches nothing; the layers are {known[0]} to {known[-1]}")
    return wanted


def _nothing_left(cfg: AdapterConfig, paths: list[str]) -> str:
    asked = {what: getattr(cfg, what) for what in ("target_names", "target_roles", "layers", "exclude_names")}
    text = ", ".join(f"{k}={v!r}" for k, v in asked.items() if (v is not None if k == "layers" else v))
    return f"none of {len(paths)} linear-like layers is left under {text}; first ones: {', '.join(map(repr, paths[:3]))}"
