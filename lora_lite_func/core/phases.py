"""What a method's functions take and give: the types of a Variant's fields.

Their arguments, everywhere:

    cfg      the method's own config
    site     the Site: path, kind, d_in, d_out, rank, strength
    p        the site's {lora_name: tensor}
    d        what the method's own `prepare` returned; None where it has none
    x        (..., d_in) the layer's input; ids (...) of an embedding
    y        (..., d_out) the layer's output
    W, b     the dense weight (d_out, d_in) and bias (d_out,) or None, float32 at least

They are pure: none may write on what it is given, since x, y, W and b can be the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from .config import AdapterConfig
from .param_spec import ParamSpec
from .site import Params, Site
from .statistics import SiteStatistics

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    ConfigT = TypeVar("ConfigT", bound=AdapterConfig, default=Any)
    DataT = TypeVar("DataT", default=Any)
    ConfigIn = TypeVar("ConfigIn", bound=AdapterConfig, contravariant=True)
    DataIn = TypeVar("DataIn", contravariant=True)
    DataOut = TypeVar("DataOut", covariant=True)
else:
    from typing import TypeVar

    ConfigT = TypeVar("ConfigT", bound=AdapterConfig)
    DataT = TypeVar("DataT")
    ConfigIn = TypeVar("ConfigIn", bound=AdapterConfig, contravariant=True)
    DataIn = TypeVar("DataIn", contravariant=True)
    DataOut = TypeVar("DataOut", covariant=True)

__all__ = [
    "AttendFn",
    "CalledOutputsFn",
    "ConfigT",
    "DataT",
    "DenseFn",
    "DirectionsFn",
    "Factors",
    "FactorsFn",
    "Forms",
    "InitFn",
    "InputsFn",
    "JointFn",
    "Layer",
    "Map",
    "NeedsFn",
    "OutputsFn",
    "ParamSpecsFn",
    "PenaltyFn",
    "PlanFn",
    "PrepareFn",
    "ProjectFn",
    "RouterFn",
    "ScaleFn",
    "ScalingFn",
    "ValidateFn",
    "VirtualDecoderFn",
    "VirtualFn",
    "VirtualLabelWeightsFn",
    "VirtualLabelsFn",
    "WeightFn",
    "Work",
]

Map: TypeAlias = Callable[[Tensor], Tensor]
"""A factor as a linear map that is called."""

Factors: TypeAlias = tuple[Tensor, Tensor, float | Tensor]
"""A (k, d_in), B (d_out, k) and s of an update s B A; s may be a tensor ()."""


class Layer(Protocol):
    """The frozen layer as `prepare` may see it."""

    @property
    def bias(self) -> Tensor | None:
        """Its bias (d_out,), if it has one."""

    @property
    def weight(self) -> Tensor:
        """Its dense weight (d_out, d_in).

        Raises:
            UnsupportedError: it has none: it is packed, offloaded, or adapted already.
        """

    @property
    def is_plain(self) -> bool:
        """Whether it has a dense weight at hand and no other adapters inside."""

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


# ---------------------------------------------------------------------------------------- the start
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


# --------------------------------------------------------------------------------------- the phases
class PrepareFn(Protocol[ConfigIn, DataOut]):
    """Small tensors that depend on the parameters alone, shared by the phases."""

    def __call__(self, cfg: ConfigIn, p: Params, site: Site, layer: Layer, /) -> DataOut:
        """The data d, which may be any pytree."""


class InputsFn(Protocol[ConfigIn, DataIn]):
    """The phase before the frozen layer."""

    def __call__(self, cfg: ConfigIn, p: Params, d: DataIn, x: Tensor, site: Site, /) -> Tensor:
        """x' (..., d_in), in x's dtype, which needn't be that of p."""


class OutputsFn(Protocol[ConfigIn, DataIn]):
    """The phase after the frozen layer."""

    def __call__(
        self, cfg: ConfigIn, p: Params, d: DataIn, x: Tensor, y: Tensor, site: Site, /
    ) -> Tensor:
        """y' (..., d_out), in y's dtype. x is what came to this adapter, before its `inputs`; y
        what the layer gave.
        """


class RouterFn(Protocol[ConfigIn, DataIn]):
    """By how much tokens are shared out among a method's experts."""

    def __call__(self, cfg: ConfigIn, p: Params, d: DataIn, x: Tensor, site: Site, /) -> Tensor:
        """Probabilities (..., E) over all experts, for the x that `outputs` gets."""


class CalledOutputsFn(Protocol[ConfigIn, DataIn]):
    """`outputs` of a method with trainable factors lora_A and lora_B, by calls of them."""

    def __call__(
        self,
        cfg: ConfigIn,
        p: Params,
        d: DataIn,
        x: Tensor,
        y: Tensor,
        site: Site,
        A: Map,
        B: Map,
        /,
    ) -> Tensor:
        """y' (..., d_out), in y's dtype, the same as `outputs` gives.

        A takes (..., d_in) to (..., r), B takes (..., r) to (..., d_out). Each is called once. x is
        in lora_A's dtype. Gradients reach lora_A and lora_B by these calls alone.
        """


class AttendFn(Protocol[ConfigIn]):
    """The phase between an attention's softmax and its output projection."""

    def __call__(
        self,
        cfg: ConfigIn,
        p: Params,
        keys: Callable[[Tensor], tuple[Tensor, Tensor]],
        q: Tensor,
        scaling: float,
        y: Tensor,
        site: Site,
        /,
    ) -> Tensor:
        """y' (N, T, heads, size), in y's dtype.

        Args:
            cfg: the config.
            p: the site's tensors; where rows have adapters of their own each (N, ...).
            keys: hidden states (..., P, d_in) -> keys and values (..., heads, P, size), by the
                attention's own projections.
            q: (N, heads, T, size) the queries, rotated where the attention rotates them.
            scaling: what products of queries and keys are multiplied by.
            y: (N, T, heads, size) what the attention gave.
            site: the site.
        """


class VirtualFn(Protocol[ConfigIn]):
    """What stands in front of a whole call's own tokens."""

    def __call__(self, cfg: ConfigIn, p: Params, site: Site, /) -> Tensor:
        """At a site of kind "call" virtual tokens (P, d), embedded as the model's own tokens are;
        at one of kind "cache" each layer's keys and values (layers, 2, P, heads * head size). P is
        `site.r`.
        """


class VirtualDecoderFn(Protocol[ConfigIn]):
    """What stands in front of the tokens that an encoder-decoder model decodes."""

    def __call__(self, cfg: ConfigIn, /) -> VirtualFn[Any] | None:
        """A function that gives P tokens (P, d) of a site's tensors; None where there are none."""


class VirtualLabelsFn(Protocol[ConfigIn]):
    """What a model's own loss expects after virtual tokens that are tokens of the vocabulary."""

    def __call__(self, cfg: ConfigIn, p: Params, site: Site, /) -> Tensor:
        """Ids (P,), -100 where the loss counts nothing."""


class VirtualLabelWeightsFn(Protocol[ConfigIn]):
    """By how much a loss counts the labels of virtual tokens."""

    def __call__(self, cfg: ConfigIn, /) -> VirtualLabelsFn[Any] | None:
        """A function that gives numbers (P,) of a site's tensors; None where they all are 1."""


# ----------------------------------------------------------------------------- the dense equivalent
class WeightFn(Protocol[ConfigIn]):
    """The dense equivalent of the phases: for merging, and for weights that are used uncalled."""

    def __call__(
        self, cfg: ConfigIn, p: Params, site: Site, W: Tensor, b: Tensor | None, /
    ) -> tuple[Tensor, Tensor | None]:
        """W' (d_out, d_in) and b' (d_out,) or None, in W's dtype.

        b is None where the layer has no bias. A b' then gives it one; an embedding adds it to every
        row of its table; a bare parameter ("parameter", "vector") refuses it.
        """


class ValidateFn(Protocol[ConfigIn]):
    """A check of frozen tensors' values, which a file may have got wrong."""

    def __call__(self, cfg: ConfigIn, p: Params, site: Site, /) -> None:
        """Asked of what a file says; p may have a leading axis of a stack's members.

        Raises:
            StructureError: a frozen tensor holds what can't be meant, such as an index out of
                range.
        """


class Work(NamedTuple):
    """What a computation does, whatever the device.

    Attributes:
        multiply_adds: how many of them matrix products take.
        passes: how many numbers are read and written by elementwise operations.
    """

    multiply_adds: float
    passes: float = 0.0


class Forms(NamedTuple):
    """The work of two equal forms, which the runtime compares for a device.

    Attributes:
        row: what the phases do for each row of input, in addition to the frozen layer.
        weight: what it takes to make W', after which one product gives the output.
    """

    row: Work
    weight: Work


class DenseFn(Protocol[ConfigIn]):
    """Whether one product with W' is the cheaper form."""

    def __call__(self, cfg: ConfigIn, site: Site, tokens: int, /) -> bool | Forms:
        """Whether, for `tokens` rows of input, a product with W' costs less than the frozen layer
        and the phases, by sizes alone; or the work of both, by which the runtime decides.
        """


class FactorsFn(Protocol[ConfigIn]):
    """The update as a factor pair."""

    def __call__(self, cfg: ConfigIn, p: Params, site: Site, /) -> Factors:
        """A (k, d_in), B (d_out, k), s, where the weight's update is s B A and nothing else."""


# ----------------------------------------------------------------------------------------- strength
class ScaleFn(Protocol[ConfigIn]):
    """The adapter at another strength."""

    def __call__(self, cfg: ConfigIn, p: Params, c: float | Tensor, /) -> Mapping[str, Tensor]:
        """The tensors at c times their strength; those left out stay. c = 0 is the base, c = 1
        changes nothing. A tensor c has shape (), or one that broadcasts over a stack's members.
        """


class PenaltyFn(Protocol[ConfigIn]):
    """What the loss has in addition, of a site's tensors alone."""

    def __call__(self, cfg: ConfigIn, p: Params, site: Site, /) -> Tensor:
        """A number (), weighted as the config says."""


class ProjectFn(Protocol[ConfigIn]):
    """A constraint of the method."""

    def __call__(self, cfg: ConfigIn, p: Params, /) -> Mapping[str, Tensor]:
        """The nearest tensors that the constraint allows; those left out stay."""
