"""A method whose phases are held to what `Variant` says of them; `ll.check` runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core.errors import ConfigError, LoraLiteError
from ..core.method import Variant
from ..core.site import Params, Site

__all__ = ["verified"]


def verified(variant: Variant) -> Variant:
    """The same method, with phases that are held to what `Variant` says of them.

    `inputs` and `outputs` have to give what came to them in shape and dtype, and `factors` two
    factors. Where they don't, the phases raise ConfigError with the site, the phase and what it
    gave. They also do where a phase has another signature, or asks for a tensor or an attribute
    that doesn't exist.
    """
    name = variant.name

    def prepare(cfg: Any, p: Params, site: Site, layer: Any) -> Any:
        return _asked(
            variant.prepare, "prepare(cfg, p, site, layer)", name, site, (cfg, p, site, layer)
        )

    def inputs(cfg: Any, p: Params, d: Any, x: Tensor, site: Site) -> Tensor:
        made = _asked(
            variant.inputs, "inputs(cfg, p, d, x, site)", name, site, (cfg, p, d, x, site)
        )
        return _like(made, x, f"site {site.path!r}: {name}.inputs", "the layer's input")

    def outputs(cfg: Any, p: Params, d: Any, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if variant.low_rank_factors is not None:
            _check_factors(
                _asked(
                    variant.low_rank_factors,
                    "low_rank_factors(cfg, p, site)",
                    name,
                    site,
                    (cfg, p, site),
                ),
                name,
                site,
            )
        made = _asked(
            variant.outputs, "outputs(cfg, p, d, x, y, site)", name, site, (cfg, p, d, x, y, site)
        )
        return _like(made, y, f"site {site.path!r}: {name}.outputs", "the layer's output")

    def virtual(cfg: Any, p: Params, site: Site) -> Tensor:
        given = (cfg, p, site)
        made = _asked(variant.virtual, "virtual(cfg, p, site)", name, site, given)
        _check_virtual(made, name, site)
        return made

    return dataclasses.replace(
        variant,
        virtual=None if variant.virtual is None else virtual,
        prepare=None if variant.prepare is None else prepare,
        inputs=None if variant.inputs is None else inputs,
        outputs=None if variant.outputs is None else outputs,
    )


def _check_virtual(made: Any, name: str, site: Site) -> None:
    """Raise ConfigError where virtual tokens, or keys and values, haven't the shape of their kind
    of site.
    """
    expected = (site.r, site.d_in) if site.kind == "call" else (site.d_in, 2, site.r, site.d_out)
    if not isinstance(made, Tensor) or tuple(made.shape) != expected:
        found = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ConfigError(f"site {site.path!r}: {name}.virtual gave {found}, expected {expected}")


def _asked(
    phase: Callable[..., Any] | None, signature: str, name: str, site: Site, args: tuple[Any, ...]
) -> Any:
    assert phase is not None
    try:
        return phase(*args)
    except LoraLiteError:
        raise
    except (TypeError, KeyError, AttributeError) as error:
        # These are the method's own mistakes; an input of a wrong shape isn't one.
        raise ConfigError(
            f"site {site.path!r}: {name}.{signature}: {type(error).__name__}: {error}"
        ) from error


def _like(made: Any, given: Any, where: str, what: str) -> Any:
    if isinstance(given, Tensor) and _kind(made) != _kind(given):
        raise ConfigError(f"{where} gave {_kind(made)}, expected {_kind(given)}, as {what}")
    return made


def _kind(value: Any) -> str:
    return (
        f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    )


def _check_factors(made: Any, name: str, site: Site) -> None:
    expected = f"expected (A (k, {site.d_in}), B ({site.d_out}, k), s)"
    where = f"site {site.path!r}: {name}.low_rank_factors gave"
    if (
        not isinstance(made, tuple)
        or len(made) != 3
        or not all(isinstance(f, Tensor) for f in made[:2])
    ):
        size = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise ConfigError(f"{where} {size}, {expected}")
    A, B = (tuple(f.shape) for f in made[:2])
    if min(len(A), len(B)) < 2 or A[-1] != site.d_in or B[-2] != site.d_out or A[-2] != B[-1]:
        raise ConfigError(f"{where} A {A}, B {B}, {expected}")
