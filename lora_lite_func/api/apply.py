"""The verbs that put an adapter to a model for the length of a call: apply, functional_call. Nothing here writes on the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.flatten import Adapters, flatten
from ..core.adapter import Adapter, leaves
from ..core.config import feature_dropout
from ..core.errors import StructureError, nearest
from ..injection.attachment import Attachment, everywhere
from ..injection.prompt import Prompt, Prompted, known
from ..injection.tree_copy import constant, copy_tree, own_bias, own_buffers
from ..layers.kinds import reads_prompt

__all__ = ["apply", "attachments_of", "check_values", "functional_call"]


# -------------------------------------------------------------------------------------------- apply
def apply(model: nn.Module, params: Adapters | Prompted, /, *args: Any, **kwargs: Any) -> Any:
    """The model's output with the adapter in: `y = ll.apply(model, params, x)`.

    The base is a constant, whatever its requires_grad says: gradients reach `params` and the
        arguments alone. Works under every
    torch.func transform, in threads, under torch.compile(fullgraph=True).

    Args:
        model: the frozen base; never written.
        params: an Adapter, or a tuple, list or dict of them, applied in order: `apply(model, (p1,
            p2), x)` is `apply(merged(model, p1), p2, x)`. An empty one is the bare base.
        *args: the model's own positional arguments.
        **kwargs: the model's own keyword arguments.

    Raises:
        StructureError: a site isn't in the model, or a tensor has the wrong shape; with the path.
        UnsupportedError: the model can't be copied (TorchScript, compiled, sharded).
    """
    return functional_call(model, params, args, kwargs)


def functional_call(
    model: nn.Module,
    params: Adapters | Prompted,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    base: Mapping[str, Tensor] | None = None,
) -> Any:
    """`apply` with the arguments as a tuple and a dict, and base weights that may be replaced.

    Args:
        model: the frozen base; never written.
        params: as in `apply`.
        args: a tuple of positional arguments; anything else is taken as the only one.
        kwargs: keyword arguments.
        base: {parameter or buffer name: tensor} to use instead of the model's own; gradients reach
            these.

    Raises:
        StructureError: as `apply`; or `base` names what the model hasn't.
    """
    args, kwargs = args if isinstance(args, tuple) else (args,), kwargs or {}
    adapters, prompt = known(params, model, args, kwargs)
    skeleton = copy_tree(
        model, everywhere(model, attachments_of(adapters, prompt, model)), _Constant(model, base)
    )
    return skeleton(*args, **kwargs)


def attachments_of(
    params: Adapters, prompt: Callable[[], Prompt] = Prompt, model: nn.Module | None = None
) -> dict[str, list[Attachment]]:
    """{path: the adapters there, in order}. Frozen tensors are constants: they get no gradient.

    Raises:
        StructureError: as `flatten`; or the tensors have no values, and the model's (if it is
            given) have.
    """
    sites: dict[str, list[Attachment]] = {}
    constant = torch.is_grad_enabled()
    for adapter, plan in flatten(params):
        check_values(adapter, model)
        layout = adapter.layout
        variant, cfg = layout.variant, layout.config
        dropout = feature_dropout(cfg)
        asked = prompt() if reads_prompt(variant) else None
        for path, tensors in adapter._data.items():
            if constant:
                specs = layout.specs[path]
                tensors = {
                    name: t if specs[name].trainable else t.detach() for name, t in tensors.items()
                }
            sites.setdefault(path, []).append(
                Attachment(variant, cfg, layout.sites[path], tensors, dropout, 0, asked, plan)
            )
    return sites


def check_values(adapter: Adapter, model: nn.Module | None) -> None:
    """Refuse an adapter on the meta device for a model that isn't: torch lets such tensors meet,
    and gives garbage.

    Raises:
        StructureError: with what to do instead.
    """
    found = leaves(adapter)
    if (
        not found
        or not isinstance(found[0], Tensor)
        or not found[0].is_meta
        or model is None
        or all(p.is_meta for p in model.parameters())
    ):
        return
    raise StructureError(
        "the adapter's tensors are on the meta device, so they have no values, and the model's "
        "aren't; load the adapter"
    )


class _Constant:
    """What a copy holds in `apply`: the base's own tensors as constants, or those of `base` in
    their place.
    """

    def __init__(self, model: nn.Module, base: Mapping[str, Tensor] | None) -> None:
        self.grad = torch.is_grad_enabled()
        self.base = {} if base is None else _tied(model, base)

    def __call__(self, copy: nn.Module, path: str) -> None:
        parameters: dict[str, Any] = copy._parameters
        buffers: dict[str, Any] = copy._buffers
        if buffers and copy.training:
            own_buffers(copy)
        if parameters:
            own_bias(copy)
        if self.base:
            for tensors in (parameters, buffers):
                for name in tensors:
                    tensors[name] = self.base.get(f"{path}.{name}" if path else name, tensors[name])
        if self.grad:
            for name, p in parameters.items():
                if (
                    p is not None
                    and p.requires_grad
                    and not (self.base and p is self.base.get(f"{path}.{name}" if path else name))
                ):
                    parameters[name] = constant(p, copy)


def _tied(model: nn.Module, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`base` with every name of a tied tensor that it names once."""
    known: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    if not isinstance(base, Mapping):
        raise StructureError(
            f"base: expected {{parameter or buffer name: tensor}}, found {type(base).__name__}"
        )
    for name, tensor in base.items():
        if name not in known:
            raise StructureError(
                f"base: {type(model).__name__} has no parameter or buffer {name!r}; "
                f"{nearest(name, known)}"
            )
        if not isinstance(tensor, Tensor):
            raise StructureError(f"base {name!r}: expected a tensor, found {type(tensor).__name__}")
        if tensor.shape != known[name].shape:
            raise StructureError(
                f"base {name!r}: expected shape {tuple(known[name].shape)}, found "
                f"{tuple(tensor.shape)}"
            )
    by_tensor = {id(known[name]): tensor for name, tensor in base.items()}
    return {
        name: base.get(name, by_tensor[id(t)]) for name, t in known.items() if id(t) in by_tensor
    }
