"""The batches of a training, each a function of the seed and its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..training import Batch
from .data import shuffled
from .encoding import Encoded, packed, packs, padded

__all__ = ["Feed"]


class Feed:
    """The batches in their order; the same whenever they are asked for.

    Args:
        rows: what is learned, encoded.
        batch: examples per batch; with `width`, groups of them.
        pad: the padding token.
        seed: of the order.
        device: where batches go.
        width: tokens of a packed row; None pads each example instead.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        *,
        batch: int,
        pad: int,
        seed: int,
        device: str = "cpu",
        width: int | None = None,
    ) -> None:
        self.rows, self.batch, self.pad, self.seed = rows, batch, pad, seed
        self.device, self.width = device, width
        self._epoch: tuple[int, list[Any]] = (-1, [])
        self.per_epoch = len(self._order(0))

    def _order(self, epoch: int) -> list[Any]:
        """What stands in a row of a batch, in the epoch's order: examples, or groups of them."""
        if self._epoch[0] != epoch:
            order = shuffled(len(self.rows), 1_000_003 * self.seed + epoch)
            chosen: list[Any] = [self.rows[i] for i in order]
            if self.width is not None:
                groups = packs(chosen, self.width)
                mixed = shuffled(len(groups), 1_000_003 * self.seed + epoch + 1)
                chosen = [groups[i] for i in mixed]
            self._epoch = (epoch, chosen)
        return self._epoch[1]

    def steps(self, epochs: float, accumulate: int) -> int:
        """How many steps see each example `epochs` times."""
        return max(1, -(-round(epochs * self.per_epoch) // (self.batch * accumulate)))

    def __call__(self, number: int) -> Batch:
        """The batch of that number, counted from 0; one that ends an epoch starts the next."""
        chosen = []
        for at in range(number * self.batch, (number + 1) * self.batch):
            epoch, place = divmod(at, self.per_epoch)
            order = self._order(epoch)
            chosen.append(order[place % len(order)])  # packing may leave an epoch a group fewer
        made = packed(chosen, self.pad) if self.width is not None else padded(chosen, self.pad)
        return {name: t.to(self.device) for name, t in made.items()}
