"""Preconditioners for the gradients of low-rank factors: pure functions before an optimizer.

With the update s B A of a weight W, A (r, d_in), B (d_out, r), g_A and g_B the factors' gradients:

    riemannian   g_A' = (B^T B + d I)^-1 g_A,   g_B' = g_B (A A^T + d I)^-1
    lora_fa      g_B' = g_B (A A^T + d I)^-1 / s^2, where A isn't trained
    lora_pro     g_A' = P g_A / s^2 + X A,   g_B' = (I - B P B^T) g_B Q / s^2 - B X
                 with P = (B^T B + d I)^-1, Q = (A A^T + d I)^-1 and X the solution of
                 B^T B X + X A A^T = -P g_A A^T / s^2

The step that `lora_pro`'s pair makes in W is the nearest one to the full gradient's that factors
can make; X, which doesn't change it, keeps the pair nearest to (g_A, g_B).

Papers: Zhang and Pilanci 2024, arXiv 2402.02347 (Riemannian); Zhang et al. 2023, arXiv 2308.03303
(LoRA-FA); Wang et al. 2024, arXiv 2407.18242 (LoRA-Pro).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..core.absent import ABSENT
from ..core.adapter import Adapter, replace
from ..core.config import real
from ..core.errors import ConfigError, StructureError, UnsupportedError, short_repr
from ..core.stacked import OF_MEMBERS, SCALING
from .alike import map_adapters

__all__ = ["precondition"]

How = Literal["riemannian", "lora_fa", "lora_pro"]

_NAMES = {"lora_A", "lora_B", "lora_A0", "lora_B0", *OF_MEMBERS}
"""Leaves of a method whose update is s B A, or that minus a frozen start."""


def precondition(
    grads: Any, params: Any, how: How = "riemannian", *, delta: float | Tensor = 1e-6
) -> Any:
    """The gradients of low-rank factors, preconditioned by the factors; for an optimizer's update.

    `grads = ll.precondition(ll.grad(loss)(trainable), ll.combine(trainable, frozen))`. Pure, per
    member of a stack; in float32 at least, each leaf returned in its dtype. `riemannian` is scaled
    gradient descent, whose steps don't depend on how large A is and B small; `lora_fa` needs A
    frozen (`ll.partition(params, lambda path, name: name == "lora_B")`); `lora_pro` follows full
    fine-tuning's gradient. While B is zero, its inverse is 1 / delta: take a larger delta, or
    plain steps first.

    Args:
        grads: gradients of the trainable leaves: an adapter, a stack, or a tuple, list or dict of
            them.
        params: the whole adapter (or stack, or tuple ...), as these gradients were taken at it.
        how: as above.
        delta: what is added to the diagonals, at least 0.

    Raises:
        StructureError: gradients of another adapter, a gradient that `how` needs missing, or one
            of A with `lora_fa`.
        UnsupportedError: a method whose update isn't s B A of leaves lora_A and lora_B.
        ConfigError: an unknown `how`, or a delta that is negative or isn't a number.
    """
    if how not in get_args(How):
        raise ConfigError(
            f"precondition: how: expected one of {', '.join(get_args(How))}, found "
            f"{short_repr(how)}"
        )
    real(delta, "precondition: delta")
    if isinstance(delta, (int, float)) and not delta >= 0:
        raise ConfigError(f"precondition: delta: expected at least 0, found {short_repr(delta)}")
    return map_adapters(
        lambda g, p: _preconditioned(g, p, how, delta), grads, "precondition", params
    )


def _preconditioned(grads: Adapter, params: Adapter, how: How, delta: float | Tensor) -> Adapter:
    """The preconditioned gradients of one adapter."""
    variant = params.layout.variant
    if grads.layout.variant is not variant or grads.layout.names != params.layout.names:
        raise StructureError("precondition: the gradients are of another adapter than params")
    made = {}
    for path, tensors in params._data.items():
        if variant.low_rank_factors is None or not {"lora_A", "lora_B"} <= {*tensors} <= _NAMES:
            raise UnsupportedError(
                f"precondition: {path!r}: {variant.name}'s update isn't a product s B A of leaves "
                f"lora_A and lora_B"
            )
        found = grads._data[path]
        asked = {"lora_B"} if how == "lora_fa" else {"lora_A", "lora_B"}
        _check_leaves(path, tensors, found, asked, how)
        s = tensors.get(SCALING, params.layout.sites[path].scaling)
        made[path] = {**found, **_site(how, found, tensors, s, delta)}
    return replace(grads, made)


def _check_leaves(
    path: str, tensors: dict[str, Any], grads: dict[str, Any], asked: set[str], how: How
) -> None:
    for name in ("lora_A", "lora_B"):
        if tensors[name] is ABSENT:
            raise StructureError(
                f"precondition: {path!r} {name} is absent from params; give the whole adapter, "
                f"ll.combine(trainable, frozen)"
            )
        if name in asked and grads[name] is ABSENT:
            raise StructureError(
                f"precondition: {path!r}: {how} needs a gradient of {name}, found none"
            )
        if name not in asked and grads[name] is not ABSENT:
            raise StructureError(
                f"precondition: {path!r}: {how} is for a frozen {name}, found a gradient of it; "
                f"train the rest, ll.partition(params, lambda path, name: name == 'lora_B')"
            )


def _site(
    how: How,
    grads: dict[str, Tensor],
    tensors: dict[str, Tensor],
    s: float | Tensor,
    delta: float | Tensor,
) -> dict[str, Tensor]:
    """The new gradients at a site, in their dtypes."""
    core = torch.promote_types(tensors["lora_A"].dtype, torch.float32)
    A, B = tensors["lora_A"].to(core), tensors["lora_B"].to(core)
    if isinstance(s, Tensor):
        s = s.to(core).view((*s.shape, *[1] * (A.ndim - s.ndim)))
    gB = grads["lora_B"].to(core)
    if how == "lora_fa":
        made = {"lora_B": gB @ _inverse(A @ A.mT, delta) / s**2}
    else:
        gA = grads["lora_A"].to(core)
        if how == "riemannian":
            made = {
                "lora_A": _inverse(B.mT @ B, delta) @ gA,
                "lora_B": gB @ _inverse(A @ A.mT, delta),
            }
        else:
            made = _lora_pro(A, B, gA / s**2, gB / s**2, delta)
    return {name: t.to(grads[name].dtype) for name, t in made.items()}


def _lora_pro(
    A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, delta: float | Tensor
) -> dict[str, Tensor]:
    """LoRA-Pro's pair of gradients, made from gradients that are already divided by s^2."""
    S, T = B.mT @ B, A @ A.mT  # (..., r, r)
    PgA = _inverse(S, delta) @ gA  # (..., r, d_in)
    gBQ = gB @ _inverse(T, delta)  # (..., d_out, r)
    X = _sylvester(S, T, -PgA @ A.mT, delta)
    projected = gBQ - B @ (_inverse(S, delta) @ (B.mT @ gBQ))
    return {"lora_A": PgA + X @ A, "lora_B": projected - B @ X}


def _inverse(M: Tensor, delta: float | Tensor) -> Tensor:
    """(M + delta I)^-1 of small symmetric matrices (..., r, r)."""
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return torch.linalg.inv_ex(M + delta * eye)[0]


def _sylvester(S: Tensor, T: Tensor, R: Tensor, delta: float | Tensor) -> Tensor:
    """X with (S + delta I) X + X (T + delta I) = R, of symmetric S and T (..., r, r)."""
    s, U = torch.linalg.eigh(S)
    t, V = torch.linalg.eigh(T)
    sums = s.unsqueeze(-1) + t.unsqueeze(-2) + 2.0 * delta  # (..., r, r)
    return U @ ((U.mT @ R @ V) / sums) @ V.mT
