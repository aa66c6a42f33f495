"""LoKr: the Kronecker product s W1 (x) W2 of a file, and the share of it that one place has. Either
factor is whole or a product of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import CheckpointError, short_repr
from ...variants import LoKrConfig
from ...variants.lokr import split
from ..assembly import ModuleEntry, Part
from .factored import Rows, Tensors, given, product, rows_of

__all__ = ["Kronecker"]


@dataclass
class Kronecker:
    """The update s W1 (x) W2. W1 (l, m) and W2 (k, n) are each a matrix, or a pair whose product it
    is.
    """

    W1: tuple[Tensor, ...]
    W2: tuple[Tensor, ...]
    scale: float

    @classmethod
    def of(cls, held: Tensors, entry: ModuleEntry) -> Kronecker:
        """Make the update of a module's factors, with the scale 1.

        Raises:
            CheckpointError: one of the factors is missing.
        """
        found: list[tuple[Tensor, ...]] = []
        for i in (1, 2):
            if f"lokr_w{i}" in held:
                found.append((held[f"lokr_w{i}"].flatten(1),))
                continue
            a, b = (given(held, f"lokr_w{i}_{side}", entry) for side in "ab")
            if f"lokr_t{i}" in held:  # beside a kernel, W2a is stored as (r, k)
                a, b = a.mT, torch.einsum("ij...,jc->ic...", held[f"lokr_t{i}"], b)
            found.append((a.flatten(1), b.flatten(1)))
        return cls(found[0], found[1], 1.0)

    @property
    def r(self) -> int:
        """The number that alpha is divided by, or 0 for two matrices, which no alpha scales."""
        return next((pair[1].shape[0] for pair in (self.W2, self.W1) if len(pair) == 2), 0)

    def share(self, rows: Rows) -> Kronecker:
        """Return the update of these rows. Where they are whole blocks or lie in one, they are rows
        of W1 or of W2. Otherwise they are rows of the product itself, as 1 (x) the update.
        """
        if not rows:
            return self
        k = self.W2[0].shape[0]
        if all(bound % k == 0 for piece in rows for bound in piece):
            blocks = tuple((first // k, end // k) for first, end in rows)
            return Kronecker((rows_of(self.W1[0], blocks), *self.W1[1:]), self.W2, self.scale)
        first, end = rows[0]
        block = first // k
        if len(rows) == 1 and end <= (block + 1) * k:
            inner = ((first - block * k, end - block * k),)
            own = (self.W1[0][block : block + 1], *self.W1[1:])
            return Kronecker(own, (rows_of(self.W2[0], inner), *self.W2[1:]), self.scale)
        return _whole(self._rows(rows))

    def dense(self) -> Tensor:
        """Return the update as a matrix (d_out, d_in)."""
        return self._rows(((0, self.W1[0].shape[0] * self.W2[0].shape[0]),))

    def _rows(self, rows: Rows) -> Tensor:
        W1, W2 = product(self.W1) * self.scale, product(self.W2)
        row = torch.cat([torch.arange(first, end, device=W1.device) for first, end in rows])
        outer, inner = W1[row // W2.shape[0]], W2[row % W2.shape[0]]  # (rows, m), (rows, n)
        return (outer[:, :, None] * inner[:, None, :]).flatten(1)

    def part(self, entry: ModuleEntry) -> Part:
        """Return the update as an adapter of a place, with factors of low rank where ours are, and
        their product elsewhere.

        Raises:
            CheckpointError: the factors aren't those of this layer.
        """
        site = entry.known("LoKr splits both sizes")
        (l, m), (k, n) = _shape(self.W1), _shape(self.W2)  # noqa: E741
        if (l * k, m * n) != (site.d_out, site.d_in):
            raise CheckpointError(
                f"{short_repr(entry.path)}: expected factors of shape ({site.d_out}, {site.d_in}),"
                f" found those of ({l} * {k}, {m} * {n})"
            )
        r, both = self.r, False
        if len(self.W2) == 2 and r < max(k, n) / 2:
            both = len(self.W1) == 2 and self.W1[1].shape[0] == r < max(l, m) / 2
            leaves = {"lora_w2_a": self.W2[0], "lora_w2_b": self.W2[1]}
            if both:
                leaves |= {"lora_w1_a": self.W1[0], "lora_w1_b": self.W1[1]}
            else:
                leaves["lora_w1"] = product(self.W1)
        else:
            r = max(k, n)
            W1 = self.W1[0] if self.scale == 1.0 and len(self.W1) == 1 else self._scaled()
            leaves = {"lora_w1": W1, "lora_w2": product(self.W2)}
        fields = {"decompose_both": both, "factor": -1}
        usual = (l, m) == (split(site.d_out, -1)[0], split(site.d_in, -1)[0])
        sited = {} if usual else {"w1_shapes": (l, m)}
        return Part(LoKrConfig, leaves, fields, r, self.scale * r, sited=sited)

    def _scaled(self) -> Tensor:
        return product(self.W1) * self.scale


def _whole(change: Tensor) -> Kronecker:
    return Kronecker((torch.ones(1, 1, dtype=change.dtype),), (change.contiguous(),), 1.0)


def _shape(pair: tuple[Tensor, ...]) -> tuple[int, int]:
    return pair[0].shape[0], pair[-1].shape[1]
