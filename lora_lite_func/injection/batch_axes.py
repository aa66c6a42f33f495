"""Which axes of a module call's arguments and results are the rows of the batch.

The module's class tells it, or the shapes do. Where neither does, the call is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedError
from ..core.torch_internals import (
    BATCH_NORMS,
    CONVOLUTIONS,
    INSTANCE_NORMS,
    RUNNING_NORMS,
    batched_dims,
    first_of,
    paired,
)
from ..kernels.row_axes import not_rows

__all__ = ["PLAIN", "Axis", "check_apart", "input_axes", "output_axis"]

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
"""Types that may come to a call and leave it besides tensors; they are the same for all rows."""


class Axis(NamedTuple):
    """Where a tensor has its rows: in which dimension, and how many entries belong to one row."""

    dim: int = 0
    each: int = 1


_FIRST = Axis()


def check_apart(module: Any) -> None:
    """Refuse a module in whose call rows meet.

    Raises:
        UnsupportedError: a norm in it takes statistics of the whole batch.
    """
    for part in module.modules():
        together = isinstance(part, BATCH_NORMS) and (part.training or part.running_mean is None)
        counts = isinstance(part, INSTANCE_NORMS) and part.training and part.track_running_stats
        if together or counts:
            raise UnsupportedError(
                f"{module._ll.path!r}: statistics of its {type(part).__name__} are the whole "
                f"batch's, so its rows can't have adapters of their own; put that in eval mode, "
                f"with running statistics, or leave the site out with exclude_names"
            )


def input_axes(
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    flat: list[Any],
    counts: Sequence[int],
) -> list[Axis | None]:
    """Where each leaf of a call's arguments has its rows; None for what all rows share.

    Raises:
        StructureError: a leaf's dimension there isn't the rows.
        UnsupportedError: it can't be told which leaves have rows.
    """
    path = module._ll.path
    if isinstance(module, nn.MultiheadAttention):
        axes = _of_attention(module, args, kwargs)
    elif isinstance(module, nn.RNNBase):
        axes = _of_recurrent(module, args, kwargs, flat)
    else:
        axes = _of_others(module, flat, counts[0])
    for t, at in zip(flat, axes, strict=True):
        for rows in counts:
            if at is not None and (t.ndim <= at.dim or t.shape[at.dim] != rows * at.each):
                raise not_rows(path, t, rows)
    return axes


def _of_attention(
    module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Axis | None]:
    names = (
        "query",
        "key",
        "value",
        "key_padding_mask",
        "need_weights",
        "attn_mask",
        "average_attn_weights",
        "is_causal",
    )
    given = [*paired(names, args), *kwargs.items()]
    along = Axis(0 if module.batch_first else 1)
    where = dict.fromkeys(names[:3], along) | {"key_padding_mask": _FIRST}
    for name, value in given:
        if name == "attn_mask" and value is not None and value.ndim == 3:
            where[name] = Axis(0, module.num_heads)
        if name in names[:3] and value.ndim != 3:
            raise _unbatched(module, value)
    return [where.get(name) if isinstance(value, Tensor) else None for name, value in given]


def _of_recurrent(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], flat: list[Any]
) -> list[Axis | None]:
    x = args[0] if args else kwargs["input"]
    if isinstance(x, nn.utils.rnn.PackedSequence):
        raise UnsupportedError(
            f"{module._ll.path!r}: rows of a packed sequence can't have adapters of their own; "
            f"give it padded"
        )
    if x.ndim != 3:
        raise _unbatched(module, x)
    own = Axis(0 if module.batch_first else 1)

    def axis_of(value: Any) -> Axis | None:
        if not isinstance(value, Tensor):
            return None
        return own if value is x else Axis(1)

    return list(map(axis_of, flat))


def _of_others(module: Any, flat: list[Any], rows: int) -> list[Axis | None]:
    """Where the arguments of any other module have their rows.

    Torch's layers take rows first in every tensor. An unknown module takes them first in its first
    tensor, and all rows may share another one.
    """
    tensors = [t for t in flat if isinstance(t, Tensor)]
    odd = first_of((value for value in flat if not isinstance(value, (Tensor, *PLAIN))), None)
    if odd is not None or not tensors:
        what = "no tensor" if odd is None else f"a {type(odd).__name__}"
        raise UnsupportedError(
            f"{module._ll.path!r} ({type(module).__name__}): is given {what}, in which rows "
            f"can't be told apart; {_LEAVE}"
        )
    x, least_dims = tensors[0], _least_dims(module)
    if x.ndim < (least_dims or 1):
        raise _unbatched(module, x)
    if x.shape[0] != rows:
        raise not_rows(module._ll.path, x, rows)
    if least_dims:
        return [_FIRST if isinstance(t, Tensor) else None for t in flat]

    def axis_of(value: Any) -> Axis | None:
        if not isinstance(value, Tensor):
            return None
        return _FIRST if value is x else _of_unknown(module, value, x, rows)

    return list(map(axis_of, flat))


_LEAVE = "leave it out with exclude_names, or call the model once per adapter"


def _of_unknown(module: Any, t: Tensor, x: Tensor, rows: int) -> Axis | None:
    """Where a further tensor of an unknown module has its rows; x (rows, ...) is the first one."""
    if t.ndim == 0 or (t.shape[0] == 1 != rows):
        return None
    inner = t.shape[0] in x.shape[1:]
    if inner != (t.shape[0] == rows):
        return None if inner else _FIRST
    raise UnsupportedError(
        f"{module._ll.path!r} ({type(module).__name__}): is given a tensor of shape "
        f"{tuple(t.shape)} beside one of shape {tuple(x.shape)}, of which it can't be told "
        f"whether its first dimension is the {rows} rows; {_LEAVE}"
    )


def _least_dims(module: Any) -> int:
    """How many dimensions an input with rows has at least.

    It is known for torch's own classes, and 0 for an unknown one.
    """
    if isinstance(module, CONVOLUTIONS):
        return len(module.kernel_size) + 2
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) + 1
    if isinstance(module, INSTANCE_NORMS):
        return batched_dims(module)
    if isinstance(module, (nn.Linear, nn.Bilinear, nn.GroupNorm, nn.EmbeddingBag, RUNNING_NORMS)):
        return 2
    return 1 if isinstance(module, nn.Embedding) else 0


def _unbatched(module: Any, x: Tensor) -> UnsupportedError:
    return UnsupportedError(
        f"{module._ll.path!r} ({type(module).__name__}): is given a tensor of shape "
        f"{tuple(x.shape)}, which has no dimension of rows; "
        "give it a batch, or call the model once per adapter"
    )


def output_axis(module: Any, n: int) -> int:
    """Where the n-th leaf of a module's output has its rows."""
    if isinstance(module, nn.MultiheadAttention):
        return 0 if module.batch_first or n else 1
    if isinstance(module, nn.RNNBase):
        return 0 if module.batch_first and not n else 1
    return 0
