"""The call of a layer whose weight is shared out over processes, with adapters around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.site import Params
from ..core.torch_internals import is_sharded, is_transformed
from ..layers.sharded import replicated, whole
from .attachment import Attachment
from .state import tensors_at

__all__ = ["prepared_whole", "sharded_call"]

Call = Callable[[Sequence[Attachment], Tensor], Any]


def sharded_call(attachments: Sequence[Attachment], module: Any, x: Any, call: Call) -> Any:
    """`call` on a DTensor, with the adapters' tensors as replicated DTensors of its mesh.

    The adapter is the same one in every process. Its gradient is summed over them, and is the same
    one in every process too.

    Args:
        attachments: the adapters, innermost first.
        module: the site.
        x: its input, a DTensor.
        call: takes (adapters, x), and gives the layer's output.

    Raises:
        UnsupportedError: rows have adapters of their own, features are dropped, the method
            does something in training alone, a transform of torch.func is around, or DTensor can't
            do what the method does.
    """
    name = attachments[-1].variant.name
    where = f"site {attachments[-1].site.path!r}: its input is sharded over processes (DTensor)"
    if any(attachment.row_plan is not None for attachment in attachments):
        raise UnsupportedError(
            f"{where}, and each row has an adapter of its own; apply one adapter, or serve rows "
            f"from the whole model"
        )
    if module.training and any(attachment.dropout for attachment in attachments):
        raise UnsupportedError(
            f"{where}, and each process would drop other features; set dropout to 0"
        )
    if any(a.variant.beyond_weight(a.cfg, module.training) for a in attachments):
        raise UnsupportedError(
            f"{where}, and each process would train by its own share of {name}; put the model in "
            f"eval mode, or use another method there (LoRA)"
        )
    if is_transformed():
        raise UnsupportedError(
            f"{where}, and torch.func's transforms don't go through that; use ll.grad or "
            f"ll.value_and_grad, outside of any"
        )
    follows = [
        attachment._replace(p=_follow(tensors_at(attachment, module), x.device_mesh))
        for attachment in attachments
    ]
    try:
        return call(follows, x)
    except (RuntimeError, NotImplementedError) as error:
        if not any(word in str(error) for word in ("DTensor", "DeviceMesh", "harding")):
            raise
        raise UnsupportedError(
            f"{where}, and {name} needs what DTensor can't do; use another method there (LoRA), or "
            f"the whole model"
        ) from error


def _follow(tensors: Params, mesh: Any) -> dict[str, Tensor]:
    return {name: t if is_sharded(t) else replicated(t, mesh) for name, t in tensors.items()}


def prepared_whole(p: Params, prepare: Callable[[Params], Any]) -> Any:
    """What `prepare` makes of plain tensors in every process, as replicated DTensors.

    Args:
        p: the adapter's tensors, replicated.
        prepare: takes the same as plain tensors.
    """
    mesh = next(iter(p.values())).device_mesh  # type: ignore[attr-defined]
    made = prepare({name: whole(t) for name, t in p.items()})
    return pytree.tree_map_only(Tensor, lambda t: replicated(t, mesh), made)
