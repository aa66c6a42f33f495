"""The contract between a method and the runtime: Site (where), ParamSpec (which tensors), Variant (the maths)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .config import AdapterConfig
from .errors import ConfigError, nearest, short_repr
from .random import Draw
from .site import Params, Site

__all__ = [
    "MATRICES",
    "Layer",
    "ParamSpec",
    "Variant",
    "dtype_fits",
    "leaf_dtype",
    "register",
    "site_for",
    "variant_for",
    "variants",
]

MATRICES = ("linear", "conv", "parameter")
"""The kinds that a dense equivalent is all it takes for."""


@dataclass(frozen=True)
class ParamSpec:
    """One tensor of a method at a site.

    Attributes:
        shape: its shape.
        init: "zeros", "ones", "kaiming" (uniform in +-1/sqrt(n), n the last dimension), or a draw
            (shape, generator) -> float32 CPU tensor, by that torch.Generator alone.
        trainable: False for a tensor that is part of the adapter but never learned.
        dtype: None is the adapter's dtype; torch.float32 means "float32 at least" (for gates,
            angles, magnitudes); an integer dtype is taken as it is.
        rank_axis: the axis that counts directions, where one more direction of zeros changes
            nothing: such tensors of different ranks stack.
    """

    shape: tuple[int, ...]
    init: Literal["zeros", "ones", "kaiming"] | Draw = "zeros"
    trainable: bool = True
    dtype: torch.dtype | None = None
    rank_axis: int | None = None


class Layer(Protocol):
    """The frozen layer as `prepare` may see it."""

    @property
    def bias(self) -> Tensor | None:
        """Its bias (d_out,), if it has one."""

    @property
    def weight(self) -> Tensor:
        """Its dense weight (d_out, d_in). Raises UnsupportedError where there is none (packed,
        offloaded, adapted already).
        """

    @property
    def is_changed(self) -> bool:
        """Whether its weight isn't the one that the method's start may have read: other adapters
        are inside, or the call has another base weight.
        """

    @property
    def training(self) -> bool:
        """Whether it is in training mode."""

    def current_weight(self) -> Tensor:
        """Its weight (d_out, d_in) with the other adapters in, made for this call: as much work as
        d_in rows through the layer.
        """

    def linear(self, x: Tensor) -> Tensor:
        """x W^T without the bias, (..., d_in) -> (..., d_out); works on quantised layers too."""


def _default_scaling(cfg: AdapterConfig, site: Site) -> float:
    return site.alpha / site.r


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One method: a record of pure functions. `p` is the site's {lora_name: tensor}, `d` what
        `prepare` returned.

    None of them may write on what it is given: x, W and b can be the model's own.

    Attributes:
        name: how files and tables call it.
        config: its config class.
        paper: authors, year, arXiv id.
        param_specs: (cfg, site) -> {lora_name: ParamSpec}. Raises UnsupportedError for what it
            can't do there.
        init: (cfg, site, specs, weight, stats, generator) -> {lora_name: tensor}, for starts that
            the specs' inits don't say; may return some of the tensors. `weight` is the dense
            (d_out, d_in) float weight if "weight" is in `needs`, else None; `generator(name)` gives
            the torch.Generator of a tensor.
        prepare: (cfg, p, site, layer) -> d, small tensors that the phases share.
        inputs: (cfg, p, d, x, site) -> x', before the frozen layer, shapes (..., d_in), in x's
            dtype (which needn't be p's: a spec's own dtype may be wider).
        outputs: (cfg, p, d, x, y, site) -> y' (..., d_out), after it, in y's dtype; x is what came
            to this adapter, y what the layer gave.
        weight: (cfg, p, site, W, b) -> (W', b'), the dense equivalent, shapes (d_out, d_in) and
            (d_out,) or None; W and b are float32 at least, whatever the layer's dtype. b is None
            where the layer has no bias; a b' then gives it one, an embedding adds it to every row
            of its table, and a bare parameter ("parameter", "vector") refuses it.
        additive: `weight` adds the same update to any W: W' - W doesn't depend on W, nor b' - b
            on b.
        validate: (cfg, p, site) -> None: raises StructureError where a frozen tensor holds values
            that can't be meant, such as an index out of range. Asked of what a file says; p may
            have a leading axis of a stack's members.
        dense: (cfg, site, tokens) -> bool: whether, for that many rows of input, one product with
            `weight`'s W' costs less than the frozen layer and the phases; by sizes (and grad mode,
            as training pays for a gradient of W') alone. The runtime then takes it at plain dense
            layers where nothing would be rounded away; by default it never does.
        scale: (cfg, p, c) -> p', the adapter at c times its strength: c = 0 is the base, c = 1
            changes nothing. What p' leaves out stays.
        project: (cfg, p) -> p' likewise, the nearest parameters that a constraint of the method
            allows; for `ll.project`, after a step.
        scaling: (cfg, site) -> float, what `site.scale` is; alpha / r by default.
        needs: what init may need: a subset of {"weight", "inputs", "gradients", "pairs"}.
        needs_by: cfg -> which of these it needs under a config; None for all.
        plan: (cfg, sites, seen) -> cfg', from what all sites saw; for ranks that are shared out
            among them.
        sites: kinds of site it can adapt, the one that it takes when the config names none first.
            By default `MATRICES` for a method with `weight` whose start needs no data, else linear
            layers; so a `weight` that always moves the bias needs them named.
        low_rank_factors: (cfg, p, site) -> (A (k, d_in), B (d_out, k), s), where the update is s B
            A and nothing else; a plain linear layer then goes by them instead of the phases, and
            `ll.combine_adapters` and the files of others take them.
        batched: its phases take several members at once as they are, leaves (m, ...) and x (m, n,
            ..., d_in), and `site.scale` may be (m,); otherwise they are mapped over the members.
    """

    name: str
    config: type[AdapterConfig]
    param_specs: Callable[[Any, Site], Mapping[str, ParamSpec]]
    paper: str = ""
    init: Callable[..., Mapping[str, Tensor]] | None = None
    prepare: Callable[[Any, Params, Site, Layer], Any] | None = None
    inputs: Callable[[Any, Params, Any, Tensor, Site], Tensor] | None = None
    outputs: Callable[[Any, Params, Any, Tensor, Tensor, Site], Tensor] | None = None
    weight: (
        Callable[[Any, Params, Site, Tensor, Tensor | None], tuple[Tensor, Tensor | None]] | None
    ) = None
    additive: bool = False
    validate: Callable[[Any, Params, Site], None] | None = None
    dense: Callable[[Any, Site, int], bool] | None = None
    scale: Callable[[Any, Params, Any], Mapping[str, Tensor]] | None = None
    project: Callable[[Any, Params], Mapping[str, Tensor]] | None = None
    scaling: Callable[[Any, Site], float] = _default_scaling
    needs: frozenset[str] = frozenset()
    needs_by: Callable[[Any], frozenset[str]] | None = None
    plan: Callable[[Any, Sequence[Site], Mapping[str, Any]], AdapterConfig] | None = None
    sites: tuple[str, ...] = ()
    low_rank_factors: (
        Callable[[Any, Params, Site], tuple[Tensor, Tensor, float | Tensor]] | None
    ) = None
    batched: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.needs, set):
            object.__setattr__(self, "needs", frozenset(self.needs))
        if not self.sites:
            object.__setattr__(
                self,
                "sites",
                MATRICES
                if self.weight is not None and set(self.needs) <= {"weight"}
                else MATRICES[:1],
            )
        if isinstance(self.sites, (set, frozenset)):  # without an order, linear layers come first
            object.__setattr__(
                self, "sites", tuple(sorted(self.sites, key=lambda kind: (kind != "linear", kind)))
            )

    def needs_of(self, cfg: AdapterConfig) -> frozenset[str]:
        """What init needs under a config."""
        return self.needs if self.needs_by is None else self.needs_by(cfg)

    @property
    def has_phases(self) -> bool:
        """Whether it can act around a layer's call; a method that can't goes by the weight."""
        return self.inputs is not None or self.outputs is not None

    def __getattr__(self, name: str) -> Any:
        if name not in _OLD_KEYWORDS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self, _OLD_KEYWORDS[name])

    def __reduce__(self) -> tuple[Any, ...]:
        return variant_for, (
            self.config,
        )  # a record of functions travels as the class of its config


_OLD_KEYWORDS = {"factor": "scaling", "factors": "low_rank_factors", "leading": "batched"}
"""What versions before 0.2.0 called fields of a Variant; still taken as keywords, and read."""


def _with_old_keywords(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def take(self: Variant, **fields: Any) -> None:
        for old, new in _OLD_KEYWORDS.items():
            if old in fields:
                if new in fields:
                    raise TypeError(
                        f"Variant: {old!r} is the old name of {new!r}; give one of them"
                    )
                fields[new] = fields.pop(old)
        init(self, **fields)

    return take


Variant.__init__ = _with_old_keywords(Variant.__init__)  # type: ignore[method-assign]

_REGISTRY: dict[type[AdapterConfig], Variant] = {}
_NEEDS = frozenset({"weight", "inputs", "gradients", "pairs"})
_OPTIONAL = (
    "init",
    "prepare",
    "inputs",
    "outputs",
    "weight",
    "validate",
    "dense",
    "scale",
    "project",
    "needs_by",
    "plan",
    "low_rank_factors",
)


def register(variant: Variant) -> Variant:
    """Make a method known by its config class and its name (files find it so); returns it.

    Raises:
        ConfigError: another method has that name or that config class, or a field says something
            that can't be meant.
    """
    if not isinstance(variant, Variant):
        raise ConfigError(f"register: expected a Variant, found {short_repr(variant)}")
    name, config = variant.name, variant.config
    if not isinstance(name, str) or not name:
        raise ConfigError(f"variant {name!r}: expected a name")
    if not isinstance(config, type) or not issubclass(config, AdapterConfig):
        raise ConfigError(
            f"variant {name!r}: expected a subclass of AdapterConfig for its config, found "
            f"{config!r}"
        )
    _check_fields(variant)
    odd = set(variant.needs) - _NEEDS
    if odd:
        raise ConfigError(
            f"variant {name!r} needs {', '.join(sorted(map(str, odd)))}; known are "
            f"{', '.join(sorted(_NEEDS))}"
        )
    for known in _REGISTRY.values():
        if known is not variant and (known.name == name or known.config is config):
            raise ConfigError(
                f"variant {name!r} ({config.__name__}): {known.name!r} has that name or config "
                f"already"
            )
    _REGISTRY[config] = variant
    return variant


def _check_fields(variant: Variant) -> None:
    where = f"variant {variant.name!r}"
    for field in ("param_specs", "scaling", *_OPTIONAL):
        value = getattr(variant, field)
        if not callable(value) and not (value is None and field in _OPTIONAL):
            raise ConfigError(f"{where}: {field}: expected a function, found {short_repr(value)}")
    if isinstance(variant.needs, str):
        raise ConfigError(
            f"{where}: needs: expected a set of names, found {short_repr(variant.needs)}"
        )
    if isinstance(variant.sites, str):
        raise ConfigError(
            f"{where}: sites: expected a tuple of names, found {short_repr(variant.sites)}"
        )
    if variant.additive and variant.weight is None:
        raise ConfigError(f"{where} is `additive`, which says how its `weight` acts, but has none")
    if variant.dense is not None and variant.weight is None:
        raise ConfigError(
            f"{where} has `dense`, which asks for a product with `weight`'s W', but no `weight`"
        )


def variants() -> dict[str, Variant]:
    """Every registered method: {name: Variant}."""
    return {v.name: v for v in sorted(_REGISTRY.values(), key=lambda v: v.name)}


def variant_for(config: type[AdapterConfig]) -> Variant:
    """The method of a config class.

    Raises:
        ConfigError: no registered method has it.
    """
    if config is type:
        raise ConfigError(
            "no variant is registered for type; give an instance of the config's class, such as "
            "ll.LoRAConfig(r=8)"
        )
    if config not in _REGISTRY:
        name = getattr(config, "__name__", repr(config))
        hint = "" if config is AdapterConfig else name  # the base of all configs is near to each
        raise ConfigError(
            f"no variant is registered for {name}; "
            f"{nearest(hint, [c.__name__ for c in _REGISTRY], first=50)}"
        )
    return _REGISTRY[config]


def leaf_dtype(spec: ParamSpec, adapter_dtype: torch.dtype) -> torch.dtype:
    """The dtype a tensor gets: the adapter's, at least what the spec says, or the spec's own if
    that isn't floating.
    """
    if spec.dtype is None:
        return adapter_dtype
    return (
        torch.promote_types(spec.dtype, adapter_dtype)
        if spec.dtype.is_floating_point
        else spec.dtype
    )


def dtype_fits(spec_dtype: torch.dtype | None, found: torch.dtype) -> bool:
    """Whether a tensor of dtype `found` can stand where a spec of that dtype is: `leaf_dtype`
    leaves it as it is.
    """
    if spec_dtype is not None and not spec_dtype.is_floating_point:
        return found == spec_dtype
    if not found.is_floating_point or found.itemsize == 1:
        return False
    return spec_dtype is None or torch.promote_types(spec_dtype, found) == found


def site_for(
    variant: Variant, cfg: AdapterConfig, site: Site, scale_tensors: dict[float, Tensor]
) -> Site:
    """The Site under a config: its scale and the scale's tensor scale_tensor (shared through
    `scale_tensors`) worked out.
    """
    scaling = float(variant.scaling(cfg, site))
    if scaling not in scale_tensors:
        scale_tensors[scaling] = torch.tensor(scaling, dtype=torch.float64, device="cpu")
    return site.having(scaling=scaling, scale_tensor=scale_tensors[scaling])
