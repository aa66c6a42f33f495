"""Full: chosen parameters themselves are trained, as a copy of any shape: a head, norms, a table.

    W' = lora_W        (the parameter's entries as a matrix, (d_out, d_in))

A file then holds them beside an adapter of another method (`ll.save((adapter, full), path)`): a new
head is drawn anew whenever its model is loaded, so its change alone wouldn't bring it back.
`keep_start` keeps the copy's start too, between which and the copy `ll.scale` moves.
Identity at the start: lora_W = W. Needs W once. r and alpha have no part in this method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, added
from ..core.errors import UnsupportedError
from ..core.method import ParamSpec, Variant
from ..core.site import Params, Site


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r and alpha have no part in this method;
    `target_parameters` says what is trained), and:

    Args:
        keep_start: keep a frozen copy of the start, as `ll.scale` needs it; twice the size.
        frozen: the copy isn't trained, it only stands for the base's: a table that was resized, a
            norm's running statistics, as a file of PEFT's has them.
    """

    keep_start: bool = False
    frozen: bool = added(False)


def param_specs(cfg: FullConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_W (d_out, d_in), and frozen lora_W0 if the start is kept."""
    specs = {"lora_W": ParamSpec((site.d_out, site.d_in), trainable=not cfg.frozen)}
    return (
        specs | {"lora_W0": ParamSpec((site.d_out, site.d_in), trainable=False)}
        if cfg.keep_start
        else specs
    )


def init(
    cfg: FullConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """Copies of the parameter."""
    return dict.fromkeys(specs, weight)


def weight(
    cfg: FullConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """lora_W, b."""
    return p["lora_W"].to(W.dtype), b


def scale(cfg: FullConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """The copy moved along the line from its start.

    Raises:
        UnsupportedError: the start wasn't kept.
    """
    if not cfg.keep_start:
        raise UnsupportedError(
            "full holds the parameters, not how far they are from their start; use "
            "FullConfig(keep_start=True)"
        )
    return {**p, "lora_W": p["lora_W0"] + c * (p["lora_W"] - p["lora_W0"])}


VARIANT = Variant(
    name="full",
    good_for="a new head beside an adapter",
    config=FullConfig,
    param_specs=param_specs,
    init=init,
    weight=weight,
    scale=scale,
    needs=frozenset({"weight"}),
    sites=("parameter", "vector"),
)
