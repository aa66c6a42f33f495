"""AdapterConfig: a method's knobs as a frozen, hashable, JSON-able value. Everything is checked while it is built."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from .errors import ConfigError, nearest

__all__ = ["DEFAULT_EXCLUDE", "AdapterConfig", "Role", "field", "from_dict", "probability", "record", "to_dict"]

Role = Literal["reader", "writer", "inner"]
Config = TypeVar("Config", bound="AdapterConfig")

DEFAULT_EXCLUDE = (r"(^|\.)(lm_head|output_head|head|proj_out|score|classifier|cls|qa_outputs)(\.|$)", r"embed")
"""Output heads and embeddings, by the names that model families give them."""

field = dataclasses.field


def record(default: Any) -> Any:
    """A field that only records where an adapter came from: it takes no part in equality, so such adapters stack."""
    return dataclasses.field(default=default, compare=False)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What every method shares. Each method's own config adds its knobs.

    Args:
        r: rank (number of directions), where the method has one.
        alpha: strength, where the method has one; a low-rank method scales its update by alpha / r.
        dtype: of the adapter's tensors; None takes the base weight's (float32 where that isn't a floating type).
            Gates, angles and magnitudes are float32 at least: in bfloat16 an optimizer's step doesn't move them.
        target_names: regexes searched in the full module path; () takes every linear-like module.
        exclude_names: regexes of paths to leave out; by default output heads and embeddings.
        target_roles: "reader" (reads the residual stream), "writer" (writes it), "inner"; () means any.
        layers: layer indices (the first number in a path); negative ones count from the end; None means all.
        rank_pattern: {regex: r}, the rank of the sites whose path matches; the first match wins.
        alpha_pattern: {regex: alpha}, likewise.

    Raises:
        ConfigError: unknown field, wrong type, bad regex, value out of range; with the nearest known name.
    """

    r: int = 8
    alpha: float = 16.0
    dtype: torch.dtype | None = record(None)
    target_names: tuple[str, ...] = record(())
    exclude_names: tuple[str, ...] = record(DEFAULT_EXCLUDE)
    target_roles: tuple[Role, ...] = record(())
    layers: tuple[int, ...] | None = record(None)
    rank_pattern: tuple[tuple[str, int], ...] = record(())
    alpha_pattern: tuple[tuple[str, float], ...] = record(())

    def __new__(cls, *args: Any, **kwargs: Any) -> AdapterConfig:
        known = [f.name for f in dataclasses.fields(cls)]
        if args:
            raise ConfigError(f"{cls.__name__} takes keywords only, found {len(args)} positional; fields: {', '.join(known)}")
        for name in kwargs:
            if name not in known:
                raise ConfigError(f"{cls.__name__} has no field {name!r}; {nearest(name, known, first=len(known))}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _coerce(getattr(self, name), hint, f"{type(self).__name__}.{name}"))
        if self.r < 1:
            raise ConfigError(f"{type(self).__name__}.r: expected at least 1, found {self.r}")
        if not math.isfinite(self.alpha):
            raise ConfigError(f"{type(self).__name__}.alpha: expected a finite number, found {self.alpha}")
        for what in ("target_names", "exclude_names"):
            for pattern in getattr(self, what):
                _compiles(pattern, f"{type(self).__name__}.{what}")
        for what in ("rank_pattern", "alpha_pattern"):
            for pattern, value in getattr(self, what):
                _compiles(pattern, f"{type(self).__name__}.{what}")
                if what == "rank_pattern" and value < 1:
                    raise ConfigError(f"{type(self).__name__}.rank_pattern[{pattern!r}]: expected at least 1, found {value}")
        self.validate()

    def validate(self) -> None:
        """A method's own checks; raises ConfigError."""

    def rank_at(self, path: str) -> int:
        """The rank at a site."""
        return next((r for pattern, r in self.rank_pattern if re.search(pattern, path)), self.r)

    def alpha_at(self, path: str) -> float:
        """The alpha at a site."""
        return next((a for pattern, a in self.alpha_pattern if re.search(pattern, path)), self.alpha)


def probability(value: float, where: str) -> None:
    """Check a dropout rate.

    Raises:
        ConfigError: outside [0, 1).
    """
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{where}: expected a probability in [0, 1), found {value}")


def to_dict(cfg: AdapterConfig) -> dict[str, Any]:
    """The config as JSON types, every field written out."""
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    return {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in values.items()}


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The config back from JSON types.

    Raises:
        ConfigError: not a mapping of names, or what the class itself refuses.
    """
    if not isinstance(values, Mapping) or not all(isinstance(k, str) for k in values):
        raise ConfigError(f"{cls.__name__}: expected a mapping of field names, found {type(values).__name__}")
    return cls(**values)


def _hints(cls: type[AdapterConfig]) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = _resolved(cls)
    return _HINTS[cls]


_HINTS: dict[type[AdapterConfig], dict[str, Any]] = {}


def _resolved(cls: type[AdapterConfig]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _compiles(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{where}: {pattern!r} is not a regular expression: {error}") from None


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint` says: lists become tuples, dicts become pairs, ints become floats; anything else is refused."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if value in args and isinstance(value, str):
            return value
        raise ConfigError(f"{where}: expected one of {', '.join(map(repr, args))}, found {value!r}")
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        if isinstance(value, str) and args[0] is str:
            value = (value,)
        if isinstance(value, Mapping):
            value = tuple(value.items())
        if not isinstance(value, (Sequence, range, set, frozenset)) or isinstance(value, (str, bytes)):
            raise ConfigError(f"{where}: expected a sequence, found {value!r}")
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return tuple(_coerce(v, args[0], f"{where}[{i}]") for i, v in enumerate(items))
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or len(value) != len(args):
            raise ConfigError(f"{where}: expected {len(args)} values, found {value!r}")
        return tuple(_coerce(v, a, where) for v, a in zip(value, args, strict=True))
    if hint is torch.dtype:
        return _dtype(value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool):
        if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
            return value
        raise ConfigError(f"{where}: expected {hint.__name__}, found {value!r}")
    return value


def _dtype(value: Any, where: str) -> torch.dtype:
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"{where}: expected a floating torch.dtype, found {value!r}")
    return found
