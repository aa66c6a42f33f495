"""Factors of an update in the shapes that PEFT stores them in, by kind of layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....core.errors import CheckpointError, UnsupportedError
from ....core.site import Site

__all__ = ["as_stored", "kernel", "through_core", "without_padding"]


def as_stored(site: Site, A: Tensor, B: Tensor, module: Any) -> dict[str, Tensor]:
    """Return {suffix: tensor} of a LoRA pair A (r, d_in), B (d_out, r). Factors of stacked experts
    come with (E, ...) in front.

    Raises:
        CheckpointError: a convolution's shape needs the base model, and none was given.
        UnsupportedError: PEFT has no LoRA of this kind of layer.
    """
    if site.kind == "embedding":
        return {"lora_embedding_A": without_padding(A, module), "lora_embedding_B": B}
    if A.ndim == 3:
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    elif site.kind == "conv":
        A, B = kernel(site.path, A, B, module)
    elif site.kind == "parameter" and site.transposed:
        A, B = B.mT, A.mT  # PEFT takes a matrix as it is stored
    elif site.kind not in ("linear", "parameter"):
        raise UnsupportedError(f"to_peft: {site.path!r}: a LoRA on a {site.kind} isn't written")
    return {"lora_A.weight": A, "lora_B.weight": B}


def without_padding(A: Tensor, module: Any) -> Tensor:
    """Return an embedding's factor (r, ids) with zeros for the padding id. PEFT would move that
    row, and this library leaves it as it is.
    """
    padding = getattr(module, "padding_idx", None)
    return A if padding is None else A.index_fill(1, torch.tensor([padding], device=A.device), 0.0)


def kernel(path: str, A: Tensor, B: Tensor, module: Any) -> tuple[Tensor, Tensor]:
    """Return the factors of a convolution's update as kernels, (r, c, *k) and (d_out, r, 1, ...).

    Raises:
        CheckpointError: no model was given.
        UnsupportedError: the convolution is in groups, which PEFT doesn't keep apart.
    """
    if module is None:
        raise CheckpointError(
            f"to_peft: {path!r}: a convolution's factors have its kernel's shape; give the base "
            f"model"
        )
    if module.groups != 1:
        raise UnsupportedError(
            f"to_peft: {path!r}: PEFT's update of a convolution in {module.groups} groups mixes "
            f"them; merge it"
        )
    shape = module.weight.shape
    return A.unflatten(1, tuple(shape[1:])), B.reshape(*B.shape, *(1 for _ in shape[2:]))


def through_core(core: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors (d_out, r) and (r, c * entries) of a kernel that is stored in Tucker's
    form, with a core (r, r, *k) between a (r, d_out) and b (r, c).
    """
    return a.mT, (core.flatten(2).mT @ b).mT.flatten(1)
