"""Updates of LyCORIS that multiply the weight: IA3, GLoRA, OFT and BOFT.

weight, on_input        IA3: W diag(1 + g) on inputs, diag(1 + g) W on outputs; a bias stays
a1, a2, b1, b2, bm      GLoRA: W + s (W a1 a2 + b1 b2)
oft_blocks, rescale     OFT: R^T W, and BOFT: R_m ... R_1 W, with R of blocks (I + Q) (I - Q)^-1;
                        alpha is the largest norm of Q, in units of d_out (0: none)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import CheckpointError, short_repr
from ...variants import IA3Config, IA3FFConfig, LoRAConfig
from ..assembly import ModuleEntry, Part
from ..whole_change import whole_change
from .changes import check_size
from .factored import Rows, Tensors, given, rows_of

__all__ = ["CONSTRAINT", "Gate", "Rotation", "Sandwich"]

CONSTRAINT = "oft_constraint"
"""The role of an OFT's alpha."""


@dataclass
class Gate:
    """IA3: a factor 1 + g of each input or output feature."""

    g: Tensor
    on_input: bool
    scale: float = 1.0

    @classmethod
    def of(cls, held: Tensors, entry: ModuleEntry) -> Gate:
        """Make the update of a module's tensors.

        Raises:
            CheckpointError: the key of the gate is missing.
        """
        return cls(given(held, "gate", entry).flatten(), bool(given(held, "on_input", entry)))

    @property
    def r(self) -> int:
        """0, because no alpha scales it."""
        return 0

    def share(self, rows: Rows) -> Gate:
        """Return the update of these rows."""
        return self if self.on_input else Gate(rows_of(self.g, rows), False)

    def part(self, entry: ModuleEntry) -> Part:
        """Return the update as an adapter of a place. Ours gates a bias too, so the outputs of a
        layer with a bias have the change of their weight instead.
        """
        site, gate = entry.known("a gate is of one side of a layer"), 1.0 + self.g.float()
        if self.on_input:
            if gate.numel() and site.d_in % gate.numel() == 0:
                # One gate of a channel holds for each entry of its kernel.
                gate = gate.repeat_interleave(site.d_in // gate.numel())
            return Part(IA3FFConfig, {"lora_g": gate})
        if not site.bias:
            return Part(IA3Config, {"lora_g": gate})
        W = entry.weight("a gate of outputs")
        check_size(entry, "weight", gate, len(W))
        return whole_change((gate[:, None] - 1.0) * W, entry)


@dataclass
class Sandwich:
    """GLoRA: s (W a1 a2 + b1 b2), which is of low rank where a2 acts on all of a layer's inputs."""

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    scale: float = 1.0

    @classmethod
    def of(cls, held: Tensors, entry: ModuleEntry) -> Sandwich:
        """Make the update of a module's factors, with the scale 1.

        Raises:
            CheckpointError: one of the factors is missing.
        """
        a1, a2, b1, b2 = (given(held, name, entry) for name in ("a1", "a2", "b1", "b2"))
        if "bm" in held:
            b2 = torch.einsum("ij...,jc->ic...", held["bm"], b2.flatten(1))
        return cls(a1.flatten(1), a2.flatten(1), b1.flatten(1), b2.flatten(1))

    @property
    def r(self) -> int:
        """The number that alpha is divided by."""
        return self.a2.shape[0]

    def share(self, rows: Rows) -> Sandwich:
        """Return the update of these rows."""
        return Sandwich(self.a1, self.a2, rows_of(self.b1, rows), self.b2, self.scale)

    def part(self, entry: ModuleEntry) -> Part:
        """Return the update as an adapter of a place."""
        W, a1, a2, b1, b2 = (
            t.float() for t in (entry.weight("GLoRA"), self.a1, self.a2, self.b1, self.b2)
        )
        if a1.shape[0] == W.shape[1]:
            A, B = torch.cat([a2, b2]), torch.cat([W @ a1, b1], dim=1)
            return Part(LoRAConfig, {"lora_A": A, "lora_B": B}, {}, len(A), self.scale * len(A))
        kernel = W.unflatten(1, (a1.shape[0], -1))  # (d_out, channels, entries)
        turned = torch.einsum("oce,cr,ri->oie", kernel, a1, a2).flatten(1)
        return whole_change(self.scale * (turned + b1 @ b2), entry)


@dataclass
class Rotation:
    """OFT and BOFT: outputs turned within blocks (..., n, b, b), and each multiplied by a
    number.
    """

    blocks: Tensor
    rescale: Tensor | None
    constraint: float
    scale: float = 1.0
    rows: Rows = ()

    @classmethod
    def of(cls, held: Tensors, entry: ModuleEntry) -> Rotation:
        """Make the update of a module's tensors.

        Raises:
            CheckpointError: the blocks are missing, or aren't square.
        """
        blocks = given(held, "oft_blocks", entry)
        if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
            raise CheckpointError(
                f"{short_repr(entry.path)}: oft_blocks: expected blocks (n, b, b) or (m, n, b, b), "
                f"found shape {tuple(blocks.shape)}"
            )
        return cls(blocks.float(), held.get("rescale"), float(held.get(CONSTRAINT, 0.0)))

    @property
    def r(self) -> int:
        """0, because no alpha scales it."""
        return 0

    def share(self, rows: Rows) -> Rotation:
        """Return the update of these rows, which `part` refuses."""
        return Rotation(self.blocks, self.rescale, self.constraint, self.scale, rows)

    def part(self, entry: ModuleEntry) -> Part:
        """Return the update as the change of a place's weight.

        Raises:
            CheckpointError: the place is one of several in a fused layer, whose rows the rotation
                mixes, or the blocks don't make up its outputs.
        """
        if self.rows:
            raise CheckpointError(
                f"{short_repr(entry.path)}: OFT mixes the rows of a layer that is several in the "
                f"model; merge it into the model with the tool that made it"
            )
        W = entry.weight("OFT")
        *_, n, b, _ = self.blocks.shape
        check_size(entry, "oft_blocks", self.blocks, len(W) * b * math.prod(self.blocks.shape[:-3]))
        R = self._rotations(len(W)).to(W)
        if self.blocks.ndim == 3:
            turned = (R.mT @ W.unflatten(0, (n, b))).flatten(0, 1)
        else:
            turned = W
            for i, stage in enumerate(R):
                order = _butterfly(len(W), 2**i * (b // 2)).to(W.device)
                mixed = (stage @ turned[order].unflatten(0, (n, b))).flatten(0, 1)
                turned = torch.empty_like(mixed).index_copy(0, order, mixed)
        if self.rescale is not None:
            turned = self.rescale.to(turned).reshape(-1, 1) * turned
        return whole_change(turned - W, entry)

    def _rotations(self, width: int) -> Tensor:
        """Return the orthogonal blocks, in the shape of the stored ones."""
        Q = self.blocks - self.blocks.mT
        bound, norm = self.constraint * width, float(Q.norm())
        if 0 < bound < norm:
            Q = Q * (bound / norm)
        one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        return torch.linalg.solve(one - Q, one + Q)  # both factors are functions of Q and commute


def _butterfly(width: int, k: int) -> Tensor:
    """Return the order in which a stage of BOFT takes the rows: pairs that are k apart side by
    side.
    """
    return torch.arange(width).unflatten(0, (-1, 2, k)).transpose(1, 2).flatten()
