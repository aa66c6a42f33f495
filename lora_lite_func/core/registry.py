"""The methods that are known, by config class and by name. The library's own come on use."""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable

from .config import AdapterConfig
from .errors import ConfigError, nearest, short_repr
from .method import Variant
from .type_variables import ConfigT, DataT

__all__ = ["register", "register_later", "variant_for", "variant_named", "variants"]

_REGISTRY: dict[type[AdapterConfig], Variant] = {}
_LATER: dict[str, Callable[[], object]] = {}
"""{a method's name: what registers it}, of those that nobody has asked for yet."""
_LOCK = threading.RLock()

_NEEDS = frozenset({"weight", "inputs", "activity", "gradients", "pairs", "reference"})
_OPTIONAL = (
    "init",
    "prepare",
    "inputs",
    "outputs",
    "router",
    "weight",
    "virtual",
    "virtual_labels",
    "virtual_label_weights",
    "virtual_decoder",
    "attend",
    "validate",
    "dense",
    "scale",
    "project",
    "penalty",
    "needs_by",
    "directions",
    "plan",
    "joint",
    "low_rank_factors",
    "called_outputs",
    "check_rows",
    "check_calls",
    "phases_always",
)


def register(variant: Variant[ConfigT, DataT]) -> Variant[ConfigT, DataT]:
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
    variant_named(name)
    for known in _REGISTRY.values():
        if known is not variant and (known.name == name or known.config is config):
            raise ConfigError(
                f"variant {name!r} ({config.__name__}): {known.name!r} has that name or config "
                f"already"
            )
    _REGISTRY[config] = variant
    return variant


def register_later(name: str, make_known: Callable[[], object]) -> None:
    """Let a method be registered when it is first asked for, so that importing the library takes
    no longer for it.

    Args:
        name: the method's name.
        make_known: registers the method of that name, and maybe others.
    """
    _LATER[name] = make_known


def variant_named(name: str) -> Variant | None:
    """The method of a name, registered if it is one that comes on use; None if there is none."""
    found = _named(name)
    if found is None:
        with _LOCK:  # who asks meanwhile waits until it is registered
            make_known = _LATER.pop(name, None)
            if make_known is not None:
                make_known()
        found = _named(name)
    return found


def _named(name: str) -> Variant | None:
    return next((v for v in list(_REGISTRY.values()) if v.name == name), None)


def _all_known() -> None:
    with _LOCK:
        for name in list(_LATER):
            variant_named(name)


def _check_fields(variant: Variant) -> None:
    where = f"variant {variant.name!r}"
    for name in ("param_specs", "scaling", *_OPTIONAL):
        value = getattr(variant, name)
        if not callable(value) and not (value is None and name in _OPTIONAL):
            raise ConfigError(f"{where}: {name}: expected a function, found {short_repr(value)}")
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
    if variant.adds and (variant.outputs is None or variant.inputs is not None):
        raise ConfigError(f"{where} has `adds`, which says how `outputs` acts, its only phase")
    if variant.dense is not None and variant.weight is None:
        raise ConfigError(
            f"{where} has `dense`, which asks for a product with `weight`'s W', but no `weight`"
        )


def variants() -> dict[str, Variant]:
    """Every registered method: {name: Variant}."""
    _all_known()
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
        _all_known()
    if config not in _REGISTRY:
        name = getattr(config, "__name__", repr(config))
        hint = "" if config is AdapterConfig else name  # the base class is close to all names
        raise ConfigError(
            f"no variant is registered for {name}; "
            f"{nearest(hint, [v.config.__name__ for v in variants().values()], first=50)}"
        )
    return _REGISTRY[config]


# Functions can't be pickled, so a method is found by its config class.
copyreg.pickle(Variant, lambda variant: (variant_for, (variant.config,)))
