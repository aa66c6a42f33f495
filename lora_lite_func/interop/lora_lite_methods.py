"""Leaves of each of lora-lite's methods."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.errors import CheckpointError, short_repr
from .assembly import ModuleEntry

__all__ = [
    "Tensors",
    "matches",
    "read_antipasto",
    "read_delora",
    "read_dora",
    "read_pissa",
    "read_plain",
]

# Fingerprints are sums of squares of weights that may have been rounded to 16 bits.
_CLOSE = 2e-3

Tensors = Mapping[str, Tensor]


def matches(weight: Tensor, expected: float | None, whole: Tensor | None = None) -> bool:
    """Tell whether a weight has the fingerprint. What is left of a `whole` weight is only as exact
    as the rounding of that weight.
    """
    size = 0.0 if whole is None else 1e-4 * float(whole.square().sum())
    return (
        expected is None
        or abs(float(weight.square().sum()) - expected) <= _CLOSE * abs(expected) + size
    )


def read_plain(
    entry: ModuleEntry, held: Tensors, r: int, scale: float, expected: float | None
) -> dict[str, Tensor]:
    """Return nothing besides what the file holds. The base is compared if it was given.

    Raises:
        CheckpointError: the base isn't the one that the file was made on.
    """
    if (
        entry.module is not None
        and expected is not None
        and not matches(entry.weight("lora-lite"), expected)
    ):
        raise CheckpointError(
            f"{short_repr(entry.path)}: the file was made on another base (its fingerprint of "
            f"the weight differs)"
        )
    return {}


def read_dora(
    entry: ModuleEntry, held: Tensors, r: int, scale: float, expected: float | None
) -> dict[str, Tensor]:
    """Return the squared norms of the base weight's rows. lora-lite computes them again in each
    call, and ours are kept.
    """
    read_plain(entry, held, r, scale, expected)
    return {"lora_wnorm2": entry.weight("DoRA").square().sum(1)}


def read_delora(
    entry: ModuleEntry, held: Tensors, r: int, scale: float, expected: float | None
) -> dict[str, Tensor]:
    """Refuse another base than the file's, told by the column norms that the file holds."""
    read_plain(entry, held, r, scale, expected)
    norms = held.get("lora_wnorm")
    if entry.module is not None and norms is not None:
        _refuse_apart(entry, norms, entry.weight("DeLoRA").norm(dim=0), "norms of its columns")
    return {}


def _refuse_apart(entry: ModuleEntry, held: Tensor, own: Tensor, what: str) -> None:
    """Refuse a base that isn't the one that a file's frozen tensor was made of.

    Raises:
        CheckpointError: the two are further apart than rounding makes them.
    """
    if held.shape != own.shape:
        return  # the code that fits the tensors refuses a wrong shape
    allowed = 1e-3 + 4.0 * torch.finfo(held.dtype).eps
    if float((held.to(own) - own).abs().max()) > allowed * float(own.abs().max()):
        raise CheckpointError(
            f"{short_repr(entry.path)}: the file was made on another base (the {what} differ); "
            f"give the base as it was before lora-lite touched it"
        )


def read_pissa(
    entry: ModuleEntry, held: Tensors, r: int, scale: float, expected: float | None
) -> dict[str, Tensor]:
    """Return the start that was taken out of W. It is the top singular triplets, divided by the
    scale or (in lora-lite's earlier versions) not, and the fingerprint tells which.

    The start is rounded to the dtype of the file, as it was when it was taken out.

    Raises:
        CheckpointError: the base isn't the one that the file was made on.
    """
    W, dtype = entry.weight("PiSSA"), held["lora_A"].dtype
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    for over in (scale, 1.0):
        if over <= 0 or r > S.shape[0]:
            continue
        root = (S[:r] / over).sqrt()
        A, B = (root[:, None] * Vh[:r]).to(dtype), (U[:, :r] * root).to(dtype)
        if matches(W - scale * (B.to(W) @ A.to(W)), expected, W):
            return {"lora_A0": A, "lora_B0": B}
    raise CheckpointError(
        f"{short_repr(entry.path)}: the file was made on another base (its fingerprint of what "
        f"PiSSA left differs)"
    )


def read_antipasto(
    entry: ModuleEntry, held: Tensors, r: int, scale: float, expected: float | None
) -> dict[str, Tensor]:
    """Check that the file's singular triplets are of the base, U_i^T W v_i = S_i. `half_angles`
    says how the variant uses T.

    Raises:
        CheckpointError: the base isn't the one that the file was made on.
    """
    if entry.module is not None:
        _refuse_triplets(entry, held)
    if entry.module is not None and expected is not None:
        W = entry.weight("AntiPaSTO")
        start = (held["lora_U"] * held["lora_S"]).to(W) @ held["lora_Vh"].to(W)
        if not matches(W - start, expected, W):
            raise CheckpointError(
                f"{short_repr(entry.path)}: the file was made on another base (its fingerprint "
                f"differs)"
            )
    return {}


def _refuse_triplets(entry: ModuleEntry, held: Tensors) -> None:
    U, S, Vh = (held.get(f"lora_{name}") for name in ("U", "S", "Vh"))
    W = entry.weight("AntiPaSTO")
    if U is None or S is None or Vh is None or U.shape[:1] + Vh.shape[-1:] != W.shape:
        return  # the code that fits the tensors refuses a wrong shape
    own = ((U.to(W).mT @ W) * Vh.to(W)).sum(1)
    _refuse_apart(entry, own.to(S.dtype), S.to(W), "singular values")
