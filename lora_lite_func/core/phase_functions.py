"""What a method's functions take and give: the types of a Variant's fields.

The phases of a call are here; `start_functions.py` has what says how tensors start, and
`update_functions.py` what says what they amount to without a call. Their arguments, everywhere:

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

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from .site import Params, Site
from .type_variables import ConfigIn, DataIn, DataOut

__all__ = [
    "AttendFn",
    "CalledOutputsFn",
    "InputsFn",
    "Layer",
    "Map",
    "OutputsFn",
    "PrepareFn",
    "RouterFn",
    "VirtualDecoderFn",
    "VirtualFn",
    "VirtualLabelWeightsFn",
    "VirtualLabelsFn",
]

Map: TypeAlias = Callable[[Tensor], Tensor]
"""A factor as a linear map that is called."""


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
