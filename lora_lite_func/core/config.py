"""AdapterConfig: a method's knobs as a frozen, hashable value that JSON can hold.

Everything is checked while a config is built.
"""

from __future__ import annotations

import dataclasses
import numbers
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from .config_values import check_pattern, check_rank, coerce
from .errors import ConfigError, nearest, short_repr
from .torch_internals import first_of

__all__ = [
    "DEFAULT_EXCLUDE",
    "LORA_LITE_EXCLUDE",
    "AdapterConfig",
    "Role",
    "added",
    "by_path",
    "dropout_of",
    "feature_dropout",
    "from_dict",
    "iterations",
    "probability",
    "real",
    "record",
    "to_dict",
    "with_paths",
]

Role = Literal["reader", "writer", "inner"]

if TYPE_CHECKING:  # the types that may be given; a tuple is kept
    Names: TypeAlias = Sequence[str]
    Roles: TypeAlias = Sequence[Role]
    Indices: TypeAlias = Sequence[int]
else:
    Names, Roles, Indices = tuple[str, ...], tuple[Role, ...], tuple[int, ...]

T = TypeVar("T")
Config = TypeVar("Config", bound="AdapterConfig")

DEFAULT_EXCLUDE = (
    r"(^|\.)(lm_head|output_head|head|proj_out|score|classifier|cls|qa_outputs)(\.|$)",
    r"embed",
)
"""Output heads and embeddings, by the names that model families give them."""

LORA_LITE_EXCLUDE = ("lm_head", "embed_tokens")
"""lora-lite's defaults: a config that was carried over may name them where there are none."""


def record(default: T) -> T:
    """A field that only records where an adapter came from. It takes no part in equality, so that
    such adapters stack.
    """
    return dataclasses.field(default=default, compare=False)


def added(default: Any) -> Any:
    """A field that older files don't have; without it they mean the default."""
    return dataclasses.field(default=default, metadata={_ADDED: True})


def by_path(default: Any) -> Any:
    """A field {path: value}, what a method keeps site by site. Older files don't have it."""
    return dataclasses.field(default=default, metadata={_ADDED: True, _BY_PATH: True})


_ADDED = "added after files of the class were written"
_BY_PATH = "its keys are the paths of sites"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What every method shares. Each method's own config adds its knobs.

    Args:
        r: rank (number of directions), where the method has one. A method without one takes the
            field and leaves it alone, and its own config says so.
        alpha: strength, where the method has one, likewise; a low-rank method scales its update by
            alpha / r.
        dtype: of the adapter's tensors; None takes the base weight's (float32 where that isn't a
            floating type). Gates, angles and magnitudes are float32 at least: in bfloat16 an
            optimizer's step doesn't move them.
        target_names: regexes searched in the full module path; () takes every module of the kinds
            asked for.
        target_kinds: which kinds of module: "linear", "conv", "embedding", "norm", "module",
            "call", "cache", "attention"; () takes the method's first (nearly always "linear"), or
            none where `target_parameters` alone says what is adapted.
        target_parameters: regexes searched in full parameter names
            ("layers.0.experts.gate_up_proj", "attn.in_proj_weight"); each match is adapted as a
            bare tensor: (d_out, d_in), or a stack of those (E, d_out, d_in).
        transposed_parameters: regexes of those stored (d_in, d_out) or (E, d_in, d_out), where
            their module doesn't say so itself.
        exclude_names: regexes of paths to leave out; by default output heads and embeddings among
            the linear layers.
        target_roles: "reader" (reads the residual stream), "writer" (writes it), "inner"; () means
            any.
        layers: layer indices (the first number in a path); negative ones count from the end; None
            means all.
        rank_pattern: {regex: r}, the rank of the sites whose path matches; the first match wins.
        alpha_pattern: {regex: alpha}, likewise.

    Raises:
        ConfigError: unknown field, wrong type, bad regex, value out of range; with the nearest
            known name.
    """

    r: int = 8
    alpha: float = 16.0
    dtype: torch.dtype | None = record(None)
    target_names: Names = record(())
    target_kinds: Names = record(())
    target_parameters: Names = record(())
    transposed_parameters: Names = record(())
    exclude_names: Names = record(DEFAULT_EXCLUDE)
    target_roles: Roles = record(())
    layers: Indices | None = record(None)
    rank_pattern: tuple[tuple[str, int], ...] = record(())
    alpha_pattern: tuple[tuple[str, float], ...] = record(())

    def __new__(cls, /, *args: Any, **kwargs: Any) -> AdapterConfig:
        known = [f.name for f in dataclasses.fields(cls)]
        if args:
            raise ConfigError(
                f"{cls.__name__} takes keywords only, found {len(args)} positional; fields: "
                f"{', '.join(known)}"
            )
        for name in kwargs:
            if name not in known:
                hint = _ELSEWHERE.get(name) or nearest(name, known, first=len(known))
                raise ConfigError(f"{cls.__name__} has no field {short_repr(name)}; {hint}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(
                self, name, coerce(getattr(self, name), hint, f"{type(self).__name__}.{name}")
            )
        check_rank(self.r, f"{type(self).__name__}.r")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is int and abs(value) >= 2**63:
                raise ConfigError(
                    f"{type(self).__name__}.{field.name}: expected an int of 64 bits, found "
                    f"{short_repr(value)}"
                )
        for alpha in (self.alpha, *(alpha for _, alpha in self.alpha_pattern)):
            if abs(alpha) > _LARGEST_ALPHA:
                raise ConfigError(
                    f"{type(self).__name__}.alpha: expected at most {_LARGEST_ALPHA:g}, found "
                    f"{alpha:g}, which overflows float32"
                )
        for what in ("target_names", "target_parameters", "transposed_parameters", "exclude_names"):
            for pattern in getattr(self, what):
                check_pattern(pattern, f"{type(self).__name__}.{what}")
        for what in ("rank_pattern", "alpha_pattern"):
            for pattern, value in getattr(self, what):
                check_pattern(pattern, f"{type(self).__name__}.{what}")
                if what == "rank_pattern":
                    check_rank(value, f"{type(self).__name__}.rank_pattern[{short_repr(pattern)}]")
        self.validate()

    def validate(self) -> None:
        """Run the method's own checks.

        Raises:
            ConfigError: a field has a value that the method doesn't allow.
        """

    def rank_at(self, path: str) -> int:
        """The rank at a site."""
        return first_of((r for pattern, r in self.rank_pattern if re.search(pattern, path)), self.r)

    def alpha_at(self, path: str) -> float:
        """The alpha at a site."""
        return first_of(
            (a for pattern, a in self.alpha_pattern if re.search(pattern, path)), self.alpha
        )


_ELSEWHERE = {  # PEFT's fields whose nearest word here is another thing
    "rank": "it is 'r' here",
    "target_modules": "it is 'target_names' here, regular expressions: r'\\.q_proj$'",
    "exclude_modules": "it is 'exclude_names' here, regular expressions",
    "layers_to_transform": "it is 'layers' here",
    "bias": "biases are learned by an ll.BitFitConfig, applied beside this adapter",
    "modules_to_save": "parameters are trained whole by an ll.FullConfig, applied beside this "
    "adapter",
    "trainable_token_indices": "rows of an embedding are trained by an ll.TokensConfig, applied "
    "beside this adapter",
    "use_dora": "it is a method of its own, ll.DoRAConfig",
    "init_lora_weights": "a start is a method of its own: ll.PiSSAConfig, ll.OLoRAConfig, "
    "ll.EVAConfig, ll.CorDAConfig, ll.LoRAGAConfig",
}


def probability(value: float, where: str) -> None:
    """Check a dropout rate.

    Raises:
        ConfigError: it is outside [0, 1).
    """
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{where}: expected a probability in [0, 1), found {value}")


def iterations(value: int | None, where: str) -> None:
    """Check how many power iterations a randomised decomposition takes; None is for the exact one.

    Raises:
        ConfigError: fewer than 0, or more than ever end.
    """
    if value is not None and not 0 <= value <= _MOST_ITERATIONS:
        raise ConfigError(
            f"{where}: expected None or at least 0 and at most {_MOST_ITERATIONS}, found {value}"
        )


_MOST_ITERATIONS = 1_000
_LARGEST_ALPHA = 1e30


def feature_dropout(cfg: AdapterConfig) -> float:
    """The probability by which entries of a branch's input are dropped in training."""
    return float(getattr(cfg, "dropout", 0.0))


def dropout_of(cfg: AdapterConfig) -> str:
    """The field by which a config asks for dropout; "" if it asks for none."""
    return first_of((name for name in ("dropout", "block_dropout") if getattr(cfg, name, 0.0)), "")


def real(value: Any, where: str) -> None:
    """Check a number that may be data: one of Python's or numpy's, or a real tensor.

    Raises:
        ConfigError: anything else.
    """
    kinds = (int, float, numbers.Real, torch.SymInt, torch.SymFloat, Tensor)
    huge = isinstance(value, int) and abs(value) > sys.float_info.max
    if not isinstance(value, kinds) or isinstance(value, bool) or huge:
        raise ConfigError(f"{where}: expected a number or a tensor, found {short_repr(value)}")
    if isinstance(value, Tensor) and value.is_complex():
        raise ConfigError(f"{where}: expected real numbers, found {value.dtype}")


def with_paths(cfg: Config, names: Mapping[str, str]) -> Config:
    """The config of some sites alone, under other names.

    Args:
        cfg: the config.
        names: {path: new path}, of the sites that are left.
    """
    moved: dict[str, Any] = {
        f.name: tuple((names[path], value) for path, value in getattr(cfg, f.name) if path in names)
        for f in dataclasses.fields(cfg)
        if _BY_PATH in f.metadata
    }
    return dataclasses.replace(cfg, **moved) if moved else cfg


def to_dict(cfg: AdapterConfig) -> dict[str, Any]:
    """The config as JSON types, every field written out."""
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    return {
        k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v
        for k, v in values.items()
    }


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The config back from JSON types, every field spelt out: a default isn't what was written,
    except of a field that was `added` since.

    Raises:
        ConfigError: not a mapping of names, a field missing, or what the class itself refuses.
    """
    if not isinstance(values, Mapping) or not all(isinstance(k, str) for k in values):
        raise ConfigError(
            f"{cls.__name__}: expected a mapping of field names, found {type(values).__name__}"
        )
    fields = [f for f in dataclasses.fields(cls) if _ADDED not in f.metadata]
    missing = [f.name for f in fields if f.name not in values]
    if missing:
        raise ConfigError(f"{cls.__name__}: expected every field, missing: {', '.join(missing)}")
    return cls(**values)


def _hints(cls: type[AdapterConfig]) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = _resolved(cls)
    return _HINTS[cls]


_HINTS: dict[type[AdapterConfig], dict[str, Any]] = {}


def _resolved(cls: type[AdapterConfig]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}
