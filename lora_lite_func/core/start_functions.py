"""Types of the functions that say which tensors a site has and how they start.

Their arguments are those of `phase_functions.py`, which has the types of the functions of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .param_spec import ParamSpec
from .site import Site
from .statistics import SiteStatistics
from .type_variables import ConfigIn, ConfigT

__all__ = [
    "DirectionsFn",
    "InitFn",
    "JointFn",
    "NeedsFn",
    "ParamSpecsFn",
    "PlanFn",
    "ScalingFn",
]


class ParamSpecsFn(Protocol[ConfigIn]):
    """Which tensors a site has."""

    def __call__(self, cfg: ConfigIn, site: Site, /) -> Mapping[str, ParamSpec]:
        """{lora_name: ParamSpec}; at least one, each name beginning with "lora_".

        Raises:
            UnsupportedError: the method can't adapt this site, with what would fit.
        """


class InitFn(Protocol[ConfigIn]):
    """Starts that the specs' own inits don't say."""

    def __call__(
        self,
        cfg: ConfigIn,
        site: Site,
        specs: Mapping[str, ParamSpec],
        weight: Any,
        stats: Any,
        generator: Callable[[str], torch.Generator],
        /,
    ) -> Mapping[str, Tensor]:
        """{lora_name: tensor} of the specs' shapes, for some or all of the names.

        Args:
            cfg: the config.
            site: the site.
            specs: what `param_specs` gave for it.
            weight: the dense weight (d_out, d_in), a Tensor of float32 at least, if "weight" is in
                the method's `needs`; else None. Of a whole call it is the model's TokenTable.
            stats: the site's SiteStatistics, if `needs` has anything but "weight", or the method
                has `joint`; else None.
            generator: lora_name -> the torch.Generator to draw that tensor with, on the CPU.

        Raises:
            ConfigError: the statistics can't serve.
        """


class NeedsFn(Protocol[ConfigIn]):
    """What `init` needs under a config."""

    def __call__(self, cfg: ConfigIn, /) -> frozenset[str]:
        """The part of the method's `needs` that this config needs."""


class DirectionsFn(Protocol[ConfigIn]):
    """Directions v of a site's inputs whose activity, the mean of |v x|, calibration records."""

    def __call__(self, cfg: ConfigIn, site: Site, weight: Tensor, /) -> Tensor:
        """The directions (k, d_in).

        Args:
            cfg: the config.
            site: the site.
            weight: its dense weight (d_out, d_in), float32 at least.
        """


class PlanFn(Protocol[ConfigT]):
    """A config made anew from what all sites saw, where ranks are shared out among them."""

    def __call__(
        self, cfg: ConfigT, sites: Sequence[Site], seen: Mapping[str, SiteStatistics], /
    ) -> ConfigT:
        """The config to start with.

        Args:
            cfg: the config.
            sites: in model order.
            seen: {path: what the site saw}.
        """


class JointFn(Protocol[ConfigIn]):
    """What the weights of several sites say together, where a start is of more than one layer."""

    def __call__(
        self, cfg: ConfigIn, sites: Sequence[Site], weight: Callable[[Site], Tensor], /
    ) -> Mapping[str, Any]:
        """{path: what `init` finds in its stats as `joint`}. The start of a site then depends on
        which others there are.

        Args:
            cfg: the config.
            sites: in model order.
            weight: site -> its dense weight (d_out, d_in), or (E, d_out, d_in) of a stack, float32
                at least; read at each asking.
        """


class ScalingFn(Protocol[ConfigIn]):
    """The scale s of a site's update."""

    def __call__(self, cfg: ConfigIn, site: Site, /) -> float:
        """What `site.scale` is to be; alpha / r by default."""
