"""Types of the functions that say what an adapter's tensors amount to without a call.

They give the weight's update, dense or as factors, its cost, its strength and its constraints.
Their arguments are those of `phase_functions.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from .site import Params, Site
from .type_variables import ConfigIn

__all__ = [
    "DenseFn",
    "Factors",
    "FactorsFn",
    "Forms",
    "PenaltyFn",
    "ProjectFn",
    "ScaleFn",
    "ValidateFn",
    "WeightFn",
    "Work",
]

Factors: TypeAlias = tuple[Tensor, Tensor, float | Tensor]
"""A (k, d_in), B (d_out, k) and s of an update s B A; s may be a tensor ()."""


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
