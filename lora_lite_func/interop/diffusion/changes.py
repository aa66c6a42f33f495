"""Changes of parameters that files hold as they are: diff of a weight, diff_b of a bias, and
set_weight, which takes a weight's place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import CheckpointError, short_repr
from ...layers.kinds import matrix, module_and_name
from ...layers.weights import stored
from ...variants import BitFitConfig, FullConfig, LNTuningConfig
from ..assembly import ModuleEntry, Part
from ..whole_change import whole_change
from .factored import Rows, Tensors, rows_of

__all__ = ["changes", "check_size", "replaced"]


def changes(held: Tensors, entry: ModuleEntry, rows: Rows) -> list[Part]:
    """Return the parts that diff and diff_b make of a layer or a norm.

    Raises:
        CheckpointError: a change has another size than its place.
    """
    site = entry.known("a change of a weight has its shape")
    weight, bias = (
        None if role not in held else rows_of(held[role], rows) for role in ("diff", "diff_b")
    )
    if weight is not None:
        check_size(entry, "diff", weight, site.d_out * site.d_in)
    if bias is not None:
        check_size(entry, "diff_b", bias, site.d_out)
    if site.kind == "norm":
        return [] if weight is None and bias is None else [_norm(entry, weight, bias)]
    found = []
    if weight is not None:
        change = matrix(weight.reshape(stored(entry.module, "weight").shape), site)
        found.append(whole_change(change, entry))
    if bias is not None:
        found.append(Part(BitFitConfig, {"lora_b": bias.flatten()}, order=1))
    return found


def _norm(entry: ModuleEntry, weight: Tensor | None, bias: Tensor | None) -> Part:
    site = entry.known("a change of a norm has its shape")
    if bias is not None and not site.bias:
        raise CheckpointError(
            f"{short_repr(entry.path)}: diff_b changes its bias, and this "
            f"{type(entry.module).__name__} has none"
        )
    given = weight if weight is not None else bias
    assert given is not None
    nothing = torch.zeros(site.d_out, dtype=given.dtype)
    leaves = {"lora_ln_w": nothing if weight is None else weight.flatten()}
    if site.bias:
        leaves["lora_ln_b"] = nothing if bias is None else bias.flatten()
    return Part(LNTuningConfig, leaves)


def replaced(role: str, t: Tensor, parameter: ModuleEntry, rows: Rows) -> Part:
    """Return the part of a parameter that is kept whole. set_weight is its value, and diff is added
    to the model's.

    Raises:
        CheckpointError: the tensor has another size than the parameter.
    """
    site = parameter.known("a change of a parameter has its shape")
    t, own = rows_of(t, rows), parameter.weight("a change of a parameter")
    check_size(parameter, role, t, own.numel())
    value = matrix(t.reshape(parameter.module._parameters[module_and_name(site)[1]].shape), site)
    return Part(FullConfig, {"lora_W": own + value.to(own) if role == "diff" else value}, order=-1)


def check_size(entry: ModuleEntry, role: str, t: Tensor, size: int) -> None:
    """Refuse a tensor of another size than its place.

    Raises:
        CheckpointError: the message gives both.
    """
    if t.numel() != size:
        raise CheckpointError(
            f"{short_repr(entry.path)}: {role}: expected {size} entries, found shape "
            f"{tuple(t.shape)}"
        )
