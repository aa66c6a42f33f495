"""The updates that files hold in factors, and the share of each that one place has.

lora    s B A;  with a factor of a kernel between them, s B (M A)
hada    s (W1a W1b) * (W2a W2b);  with t1 and t2 of a kernel likewise
lokr    s W1 (x) W2, either of them a product of two
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import CheckpointError, short_repr
from ...variants import LoHaConfig, LoKrConfig, LoRAConfig
from ...variants.lokr import split
from ..assembly import ModuleEntry, Part
from ..peft.methods.lora import factors

__all__ = [
    "Factored",
    "Hadamard",
    "Held",
    "Kronecker",
    "LowRank",
    "Rows",
    "rows_of",
    "whole_change",
]

Held = Mapping[str, Tensor]
"""{role: tensor} of one module of a file."""

Rows = tuple[tuple[int, int], ...]
"""Which output rows are meant, as (first, last + 1); () for all."""


def rows_of(t: Tensor, rows: Rows) -> Tensor:
    """These rows of a tensor."""
    return torch.cat([t[first:end] for first, end in rows]) if rows else t


@dataclass
class LowRank:
    """s B A: A (r, d_in), B (d_out, r)."""

    A: Tensor
    B: Tensor
    scale: float

    @classmethod
    def of(cls, held: Held, entry: ModuleEntry) -> LowRank:
        """The factors of a module, with the scale 1.

        Raises:
            CheckpointError: half a pair, or factors that make no matrix.
        """
        down, up = _given(held, "down", entry), _given(held, "up", entry)
        if "mid" in held:
            down = torch.einsum("ij...,jc->ic...", held["mid"], down.flatten(1))
        A, B = factors(entry, {"lora_A.weight": down, "lora_B.weight": up})
        return cls(A, B, 1.0)

    @property
    def r(self) -> int:
        """What alpha is divided by."""
        return self.A.shape[0]

    def share(self, rows: Rows) -> LowRank:
        """The update of these rows."""
        return LowRank(self.A, rows_of(self.B, rows), self.scale)

    def dense(self) -> Tensor:
        """(d_out, d_in)."""
        return _product((self.B, self.A)) * self.scale

    def part(self, entry: ModuleEntry) -> Part:
        """As an adapter of a place."""
        leaves = {"lora_A": self.A, "lora_B": self.B}
        return Part(LoRAConfig, leaves, {"rslora": False}, self.r, self.scale * self.r)


@dataclass
class Hadamard:
    """s (W1a W1b) * (W2a W2b): W1a, W2a (d_out, r), W1b, W2b (r, d_in)."""

    leaves: dict[str, Tensor]
    scale: float

    @classmethod
    def of(cls, held: Held, entry: ModuleEntry) -> Hadamard:
        """The factors of a module, with the scale 1.

        Raises:
            CheckpointError: one of them is missing.
        """
        leaves: dict[str, Tensor] = {}
        for i in (1, 2):
            a, b = (_given(held, f"hada_w{i}_{side}", entry) for side in "ab")
            if f"hada_t{i}" in held:  # beside it, W1a is stored (r, d_out)
                a, b = a.mT, torch.einsum("ij...,jc->ic...", held[f"hada_t{i}"], b)
            leaves |= {f"lora_w{i}_a": a.flatten(1), f"lora_w{i}_b": b.flatten(1)}
        return cls(leaves, 1.0)

    @property
    def r(self) -> int:
        """What alpha is divided by."""
        return self.leaves["lora_w1_b"].shape[0]

    def share(self, rows: Rows) -> Hadamard:
        """The update of these rows."""
        held = {n: rows_of(t, rows) if n.endswith("_a") else t for n, t in self.leaves.items()}
        return Hadamard(held, self.scale)

    def dense(self) -> Tensor:
        """(d_out, d_in)."""
        held = self.leaves
        first, second = (_product((held[f"lora_w{i}_a"], held[f"lora_w{i}_b"])) for i in (1, 2))
        return first * second * self.scale

    def part(self, entry: ModuleEntry) -> Part:
        """As an adapter of a place."""
        return Part(LoHaConfig, self.leaves, {}, self.r, self.scale * self.r)


@dataclass
class Kronecker:
    """s W1 (x) W2: W1 (l, m) and W2 (k, n), each a matrix or a pair whose product it is."""

    W1: tuple[Tensor, ...]
    W2: tuple[Tensor, ...]
    scale: float

    @classmethod
    def of(cls, held: Held, entry: ModuleEntry) -> Kronecker:
        """The factors of a module, with the scale 1.

        Raises:
            CheckpointError: one of them is missing.
        """
        found: list[tuple[Tensor, ...]] = []
        for i in (1, 2):
            if f"lokr_w{i}" in held:
                found.append((held[f"lokr_w{i}"].flatten(1),))
                continue
            a, b = (_given(held, f"lokr_w{i}_{side}", entry) for side in "ab")
            if f"lokr_t{i}" in held:  # beside it, W2a is stored (r, k)
                a, b = a.mT, torch.einsum("ij...,jc->ic...", held[f"lokr_t{i}"], b)
            found.append((a.flatten(1), b.flatten(1)))
        return cls(found[0], found[1], 1.0)

    @property
    def r(self) -> int:
        """What alpha is divided by; 0 for two matrices, which no alpha scales."""
        return next((pair[1].shape[0] for pair in (self.W2, self.W1) if len(pair) == 2), 0)

    def share(self, rows: Rows) -> Kronecker:
        """The update of these rows. Those of W1 or of W2 where they are whole blocks or in one;
        otherwise the product itself, as 1 (x) the update.
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
        """(d_out, d_in)."""
        return self._rows(((0, self.W1[0].shape[0] * self.W2[0].shape[0]),))

    def _rows(self, rows: Rows) -> Tensor:
        W1, W2 = _product(self.W1) * self.scale, _product(self.W2)
        row = torch.cat([torch.arange(first, end, device=W1.device) for first, end in rows])
        outer, inner = W1[row // W2.shape[0]], W2[row % W2.shape[0]]  # (rows, m), (rows, n)
        return (outer[:, :, None] * inner[:, None, :]).flatten(1)

    def part(self, entry: ModuleEntry) -> Part:
        """As an adapter of a place: factors of low rank where ours are, their product elsewhere.

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
                leaves["lora_w1"] = _product(self.W1)
        else:
            r = max(k, n)
            W1 = self.W1[0] if self.scale == 1.0 and len(self.W1) == 1 else self._scaled()
            leaves = {"lora_w1": W1, "lora_w2": _product(self.W2)}
        fields = {"decompose_both": both, "factor": -1}
        usual = (l, m) == (split(site.d_out, -1)[0], split(site.d_in, -1)[0])
        sited = {} if usual else {"w1_shapes": (l, m)}
        return Part(LoKrConfig, leaves, fields, r, self.scale * r, sited=sited)

    def _scaled(self) -> Tensor:
        return _product(self.W1) * self.scale


Factored = LowRank | Hadamard | Kronecker


def whole_change(change: Tensor, entry: ModuleEntry) -> Part:
    """A change of the weight itself (d_out, d_in), as 1 (x) the change."""
    return _whole(change).part(entry)


def _whole(change: Tensor) -> Kronecker:
    return Kronecker((torch.ones(1, 1, dtype=change.dtype),), (change.contiguous(),), 1.0)


def _product(pair: tuple[Tensor, ...]) -> Tensor:
    """The matrix that one or two are; a product in float32 at least, as rounding it would change
    what the file says.
    """
    if len(pair) == 1:
        return pair[0]
    a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in pair)
    return a @ b


def _shape(pair: tuple[Tensor, ...]) -> tuple[int, int]:
    return pair[0].shape[0], pair[-1].shape[1]


def _given(held: Held, role: str, entry: ModuleEntry) -> Tensor:
    if role not in held:
        raise CheckpointError(
            f"{short_repr(entry.path)} has {', '.join(sorted(held))} and lacks "
            f"{_SPELT.get(role, role)}: factors come in pairs, so the file is incomplete"
        )
    return held[role]


_SPELT: Mapping[str, Any] = {"down": "down (lora_A, lora_down)", "up": "up (lora_B, lora_up)"}
