"""What calibration hands on: sums for each site, as values that add up over shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError, StructureError, nearest

__all__ = ["Moments", "SiteStatistics", "Statistics"]


class Moments(NamedTuple):
    """Sums over the tokens that came to a layer, float32 at least. They are never changed in place,
    so that layers with the same input share them.
    """

    tokens: int
    total: Tensor  # (d_in,) sum of x
    absolute: Tensor  # (d_in,) sum of |x|
    squares: Tensor  # (d_in, d_in) sum of x^T x

    @classmethod
    def none(cls, width: int, dtype: torch.dtype, device: torch.device) -> Moments:
        """The sums over no tokens at all."""
        vector = torch.zeros(width, dtype=dtype, device=device)
        return cls(0, vector, vector, torch.zeros(width, width, dtype=dtype, device=device))

    def seeing(self, x: Tensor) -> Moments:
        """The sums with the rows of x (N, d_in) added."""
        x = x.to(self.squares)
        squares = torch.addmm(self.squares, x.mT, x)
        return Moments(
            self.tokens + len(x), self.total + x.sum(0), self.absolute + x.abs().sum(0), squares
        )

    def plus(self, other: Moments) -> Moments:
        """The sums over the tokens of both."""
        squares = self.squares + other.squares
        return Moments(
            self.tokens + other.tokens,
            self.total + other.total,
            self.absolute + other.absolute,
            squares,
        )


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """What one site saw, and what else its start is made of.

    Attributes:
        calls: how often the layer was called.
        batches: how many batches the run had.
        moments: sums over its input's tokens, if the method needs inputs.
        slope: the sum over batches of d loss / d W (d_out, d_in), if the method needs gradients and
            any came.
        active: (k,), the sums of |v x| over its input's tokens, if the method needs the activity of
            directions v.
        points: (2, n, d_in), its input at the last token of n positive texts and their negative
            counterparts, if the method needs pairs.
        reference: (d_out, d_in), the dense weight of the same path in the model that `ll.init` was
            given as a reference, float32 at least, if the method needs one.
        joint: what the method's `joint` gave for this site.
    """

    calls: int
    batches: int
    moments: Moments | None = None
    slope: Tensor | None = None
    points: Tensor | None = None
    active: Tensor | None = None
    reference: Tensor | None = None
    joint: Any = None

    @property
    def count(self) -> int:
        """How many tokens were seen, N (padding left out).

        Raises:
            ConfigError: no inputs were recorded.
        """
        return self._seen.tokens

    @property
    def mean(self) -> Tensor:
        """The mean of x, (d_in,).

        Raises:
            ConfigError: no inputs were recorded.
        """
        return self._seen.total / self.count

    @property
    def magnitude(self) -> Tensor:
        """The mean of |x|, (d_in,).

        Raises:
            ConfigError: no inputs were recorded.
        """
        return self._seen.absolute / self.count

    @property
    def second(self) -> Tensor:
        """The mean of x^T x, (d_in, d_in).

        Raises:
            ConfigError: no inputs were recorded.
        """
        return self._seen.squares / self.count

    @property
    def activity(self) -> Tensor:
        """(k,) mean of |v x| over tokens, for the directions v that the method named.

        Raises:
            ConfigError: none was recorded.
        """
        if self.active is None:
            raise ConfigError(
                "these statistics have no activity of directions; calibrate with a method that "
                "chooses by it"
            )
        return self.active / self.count

    @property
    def gradient(self) -> Tensor:
        """(d_out, d_in) mean over batches of the gradient of the loss in the weight.

        Raises:
            ConfigError: none was recorded.
        """
        if self.slope is None:
            raise ConfigError(
                "these statistics have no gradient; calibrate with a method that needs it, and a "
                "loss_fn"
            )
        return self.slope / self.batches

    @property
    def pairs(self) -> Tensor:
        """(2, n, d_in): inputs at the last token, of positive texts and of their counterparts.

        Raises:
            ConfigError: none were recorded.
        """
        if self.points is None:
            raise ConfigError(
                "these statistics have no pairs; calibrate with a method that starts from "
                "contrastive pairs"
            )
        return self.points

    @property
    def _seen(self) -> Moments:
        if self.moments is None:
            raise ConfigError(
                "these statistics are of gradients alone; calibrate with a method that needs inputs"
            )
        return self.moments


@dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, SiteStatistics]):
    """{site path: what it saw}. Those of two shards add up to those of the whole: `calibrate(.., a)
    + calibrate(.., b)`.

    Attributes:
        sites: {path: SiteStatistics}.
    """

    sites: Mapping[str, SiteStatistics]

    def __getitem__(self, path: str) -> SiteStatistics:
        try:
            return self.sites[path]
        except KeyError:
            raise KeyError(f"no site {path!r}; {nearest(str(path), self.sites)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __add__(self, other: Statistics) -> Statistics:
        if not isinstance(other, Statistics):
            return NotImplemented
        for path in sorted(self.sites.keys() ^ other.sites.keys()):
            raise StructureError(
                f"statistics: site {path!r} is in "
                f"{'the first' if path in self.sites else 'the second'} alone"
            )
        shared: dict[tuple[int, int], Moments] = {}
        return Statistics(
            {path: _plus(path, a, other.sites[path], shared) for path, a in self.sites.items()}
        )

    def __repr__(self) -> str:
        batches = max((site.batches for site in self.sites.values()), default=0)
        return f"Statistics({len(self.sites)} sites, {batches} batches)"


def _plus(
    path: str, a: SiteStatistics, b: SiteStatistics, shared: dict[tuple[int, int], Moments]
) -> SiteStatistics:
    if (a.moments is None) != (b.moments is None):
        raise StructureError(
            f"statistics: site {path!r} has inputs in one of the two alone; calibrate both for "
            f"the same method"
        )
    moments = None
    if a.moments is not None and b.moments is not None:
        key = (id(a.moments), id(b.moments))
        if key not in shared:
            shared[key] = a.moments.plus(b.moments)
        moments = shared[key]
    slopes = [s.slope for s in (a, b) if s.slope is not None]
    slope = None if not slopes else slopes[0] if len(slopes) == 1 else slopes[0] + slopes[1]
    points = [s.points for s in (a, b) if s.points is not None]
    joined = torch.cat(points, dim=1) if points else None
    both = a.active is not None and b.active is not None
    if not both and (a.active is not None or b.active is not None):
        raise StructureError(
            f"statistics: site {path!r} has the activity of directions in one of the two alone; "
            f"calibrate both for the same method"
        )
    active = a.active + b.active if a.active is not None and b.active is not None else None
    return SiteStatistics(a.calls + b.calls, a.batches + b.batches, moments, slope, joined, active)
