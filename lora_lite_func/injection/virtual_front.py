"""Where virtual tokens stand in a batch: in front of each row's own.

Rows may have unlike numbers of them, and padding. Causal models get the unused places masked, in
front of all, and positions that don't count them; so calls can go on from a cache. Models that see
all tokens at once often number places themselves, so there the unused ones and padding go to the
end of the row, and what the model makes of the row's own tokens is taken from where they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Front"]


class Front(NamedTuple):
    """The places of virtual tokens in front of a batch.

    Attributes:
        slots: P, how many places there are.
        lengths: (N,) int64, how many of them each row uses; None where every row uses all.
        order: (N, P + T), which of the joined tokens each place of the row has; None where that is
            the joined order itself.
    """

    slots: int
    lengths: Tensor | None = None
    order: Tensor | None = None

    def mask(self, given: Tensor | None, rows: int, tokens: int, device: Any) -> Tensor | None:
        """The joined mask (N, P + T); None where there is nothing to mask.

        Args:
            given: (N, T), that of the row's own tokens.
            rows: N, for where none was given.
            tokens: T, likewise.
            device: of the batch.
        """
        if given is None and self.lengths is None:
            return None
        if given is None:
            given = torch.ones((rows, tokens), dtype=torch.int64, device=device)
        own = given.expand(rows, -1)
        used = own.new_ones((rows, self.slots))
        if self.lengths is not None:
            place = torch.arange(self.slots, device=own.device)
            used = (place >= self.slots - self.lengths.to(own.device)[:, None]).to(own.dtype)
        return torch.cat([used, own], dim=1)

    def joined_mask(self, mask: Tensor) -> Tensor:
        """The joined mask (N, P + T) in the order of the row's places."""
        if self.order is None:
            return mask
        return self.join(mask[:, : self.slots], mask[:, self.slots :])

    def packed(self, mask: Tensor | None) -> Front:
        """The same tokens with what the joined mask leaves out at the end of each row."""
        if mask is None:
            return self
        return self._replace(order=torch.argsort((mask == 0).long(), dim=1, stable=True))

    def aligned(self, values: Tensor, dim: int) -> Tensor:
        """What a row has for each virtual token, (N, ..., P, ...) with the used ones first, with
        them last.
        """
        if self.lengths is None:
            return values
        place = torch.arange(self.slots, device=values.device)
        unused = self.slots - self.lengths.to(values.device)[:, None]
        return _taken(values, (place - unused) % self.slots, dim)

    def join(self, front: Tensor, own: Tensor) -> Tensor:
        """(N, P, ...) and (N, T, ...) as (N, P + T, ...)."""
        both = torch.cat([front, own], dim=1)
        return both if self.order is None else _taken(both, self.order, 1)

    def fill(self, own: Tensor, value: int) -> Tensor:
        """`join` with one number in front."""
        return self.join(own.new_full((own.shape[0], self.slots, *own.shape[2:]), value), own)

    def own(self, joined: Tensor) -> Tensor:
        """(N, T, ...) of the row's own tokens, of (N, P + T, ...)."""
        if self.order is None:
            return joined[:, self.slots :]
        return _taken(joined, torch.argsort(self.order, dim=1)[:, self.slots :], 1)

    def counted(self, device: Any) -> int | Tensor:
        """How many virtual tokens come before a row's own: P, or (N, 1)."""
        return self.slots if self.lengths is None else self.lengths.to(device)[:, None]

    def positions(self, given: Tensor) -> Tensor:
        """Positions (..., P + T) of all tokens, of those (..., T) of the row's own tokens."""
        own = given + self.counted(given.device)
        place = torch.arange(self.slots, device=given.device, dtype=given.dtype)
        if self.lengths is not None:
            place = (place - (self.slots - self.lengths.to(given.device)[:, None])).clamp(min=0)
        front = place.expand(*own.shape[:-1], self.slots)
        if own.ndim != 2:
            return torch.cat([front, own], dim=-1)
        rows = own.shape[0] if self.order is None else self.order.shape[0]
        return self.join(front.expand(rows, -1), own.expand(rows, -1))


def _taken(values: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries along one dimension, others for each row: of values (N, ..., n, ...) those at
    index (N, k).
    """
    shape = [1] * values.ndim
    shape[0], shape[dim] = index.shape
    return torch.take_along_dim(values, index.to(values.device).view(shape), dim)
