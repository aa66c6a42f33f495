"""Updates in factors of low rank, and the share of each that one place has.

lora    s B A;  with a factor of a kernel between them, s B (M A)
hada    s (W1a W1b) * (W2a W2b);  with t1 and t2 of a kernel likewise
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import CheckpointError, short_repr
from ...variants import LoHaConfig, LoRAConfig
from ..assembly import ModuleEntry, Part
from ..peft.methods.lora import factors

__all__ = ["Hadamard", "LowRank", "Rows", "Tensors", "given", "product", "rows_of"]

Tensors = Mapping[str, Tensor]
"""{role: tensor} of one module of a file."""

Rows = tuple[tuple[int, int], ...]
"""Which output rows are meant, as (first, last + 1); () for all."""


def rows_of(t: Tensor, rows: Rows) -> Tensor:
    """Return these rows of a tensor."""
    return torch.cat([t[first:end] for first, end in rows]) if rows else t


@dataclass
class LowRank:
    """The update s B A, with A (r, d_in) and B (d_out, r)."""

    A: Tensor
    B: Tensor
    scale: float

    @classmethod
    def of(cls, held: Tensors, entry: ModuleEntry) -> LowRank:
        """Make the update of a module's factors, with the scale 1.

        Raises:
            CheckpointError: half a pair, or factors that make no matrix.
        """
        down, up = given(held, "down", entry), given(held, "up", entry)
        if "mid" in held:
            down = torch.einsum("ij...,jc->ic...", held["mid"], down.flatten(1))
        A, B = factors(entry, {"lora_A.weight": down, "lora_B.weight": up})
        return cls(A, B, 1.0)

    @property
    def r(self) -> int:
        """The number that alpha is divided by."""
        return self.A.shape[0]

    def share(self, rows: Rows) -> LowRank:
        """Return the update of these rows."""
        return LowRank(self.A, rows_of(self.B, rows), self.scale)

    def dense(self) -> Tensor:
        """Return the update as a matrix (d_out, d_in)."""
        return product((self.B, self.A)) * self.scale

    def part(self, entry: ModuleEntry) -> Part:
        """Return the update as an adapter of a place."""
        leaves = {"lora_A": self.A, "lora_B": self.B}
        return Part(LoRAConfig, leaves, {"rslora": False}, self.r, self.scale * self.r)


@dataclass
class Hadamard:
    """The update s (W1a W1b) * (W2a W2b), with W1a, W2a (d_out, r) and W1b, W2b (r, d_in)."""

    leaves: dict[str, Tensor]
    scale: float

    @classmethod
    def of(cls, held: Tensors, entry: ModuleEntry) -> Hadamard:
        """Make the update of a module's factors, with the scale 1.

        Raises:
            CheckpointError: one of the factors is missing.
        """
        leaves: dict[str, Tensor] = {}
        for i in (1, 2):
            a, b = (given(held, f"hada_w{i}_{side}", entry) for side in "ab")
            if f"hada_t{i}" in held:  # beside a kernel, W1a is stored as (r, d_out)
                a, b = a.mT, torch.einsum("ij...,jc->ic...", held[f"hada_t{i}"], b)
            leaves |= {f"lora_w{i}_a": a.flatten(1), f"lora_w{i}_b": b.flatten(1)}
        return cls(leaves, 1.0)

    @property
    def r(self) -> int:
        """The number that alpha is divided by."""
        return self.leaves["lora_w1_b"].shape[0]

    def share(self, rows: Rows) -> Hadamard:
        """Return the update of these rows."""
        held = {n: rows_of(t, rows) if n.endswith("_a") else t for n, t in self.leaves.items()}
        return Hadamard(held, self.scale)

    def dense(self) -> Tensor:
        """Return the update as a matrix (d_out, d_in)."""
        held = self.leaves
        first, second = (product((held[f"lora_w{i}_a"], held[f"lora_w{i}_b"])) for i in (1, 2))
        return first * second * self.scale

    def part(self, entry: ModuleEntry) -> Part:
        """Return the update as an adapter of a place."""
        return Part(LoHaConfig, self.leaves, {}, self.r, self.scale * self.r)


def product(pair: tuple[Tensor, ...]) -> Tensor:
    """Return one matrix as it is, or the product of two. The product is in float32 at least,
    because rounding it would change what the file says.
    """
    if len(pair) == 1:
        return pair[0]
    a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in pair)
    return a @ b


def given(held: Tensors, role: str, entry: ModuleEntry) -> Tensor:
    """Return the tensor of a role.

    Raises:
        CheckpointError: there is none.
    """
    if role not in held:
        raise CheckpointError(
            f"{short_repr(entry.path)} has {', '.join(sorted(held))} and lacks "
            f"{_SPELT.get(role, role)}: factors come in pairs, so the file is incomplete"
        )
    return held[role]


_SPELT: Mapping[str, Any] = {"down": "down (lora_A, lora_down)", "up": "up (lora_B, lora_up)"}
