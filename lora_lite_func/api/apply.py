"""The verbs that put an adapter to a model for the length of a call: apply and functional_call.

Nothing here writes on the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..algebra.flatten import Adapters, flatten
from ..core.adapter import Adapter
from ..core.errors import StructureError, nearest
from ..core.shared import each_site
from ..core.stacked import PRESENT
from ..core.torch_internals import first_of
from ..injection.attachment import Attachment
from ..injection.base_tensors import Constants
from ..injection.prompt import Prompt, Prompted
from ..injection.tree_copy import copy_tree

__all__ = ["apply", "attachments_of", "check_values", "functional_call", "with_prompt"]


# -------------------------------------------------------------------------------------------- apply
def apply(model: nn.Module, params: Adapters | Prompted, /, *args: Any, **kwargs: Any) -> Any:
    """The model's output with the adapter in: `y = ll.apply(model, params, x)`.

    The base is a constant, whatever its requires_grad says: gradients reach `params` and the
    arguments alone. Works under every torch.func transform, in threads, under
    torch.compile(fullgraph=True).

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
    sites = attachments_of(*with_prompt(params), model)
    tree = copy_tree(model, sites, Constants(_tied(model, base) if base is not None else {}))
    return tree(*args, **kwargs)


def with_prompt(params: Adapters | Prompted) -> tuple[Adapters, Prompt | None]:
    """(The adapters, the prompt that was given with them)."""
    if type(params) is Prompted:
        return params.params, Prompt(params.mask, True)
    return cast(Adapters, params), None


def attachments_of(
    params: Adapters, prompt: Prompt | None = None, model: nn.Module | None = None
) -> dict[str, list[Attachment]]:
    """{path: the adapters there, in order}. Frozen tensors are constants, so they get no gradient.

    Args:
        params: as `apply` takes them.
        prompt: the prompt that was given with them; None where the model's calls tell it.
        model: the base.

    Raises:
        StructureError: as in `flatten`, or the tensors have no values while those of the model (if
            it is given) have.
    """
    sites: dict[str, list[Attachment]] = {}
    detach_frozen = torch.is_grad_enabled()
    for adapter, plan in flatten(params):
        check_values(adapter, model)
        layout = adapter.layout
        variant, cfg = layout.variant, layout.config
        for path, tensors in each_site(layout.shared, adapter._data):
            present = tensors.get(PRESENT)
            if detach_frozen:
                specs = layout.specs[path]
                tensors = {
                    name: t if specs[name].trainable else t.detach() for name, t in tensors.items()
                }
            attachment = Attachment(
                variant,
                cfg,
                layout.sites[path],
                tensors,
                layout.dropout,
                prompt=prompt,
                row_plan=None if plan is None else plan.at_site(layout, path, present),
                optional=plan is None and present is not None,
                shared=layout.shared.get(path, ()),
            )
            sites.setdefault(path, []).append(attachment)
    return sites


def check_values(adapter: Adapter, model: nn.Module | None) -> None:
    """Refuse an adapter on the meta device for a model that isn't on it.

    Torch lets such tensors meet, and gives garbage.

    Raises:
        StructureError: the adapter has no values; the message says what to do instead.
    """
    tensors: Any = first_of(adapter._data.values(), {})
    first = first_of(tensors.values(), None)
    if not isinstance(first, Tensor) or not first.is_meta or model is None:
        return
    if all(p.is_meta for p in model.parameters()):
        return
    raise StructureError(
        "the adapter's tensors are on the meta device, so they have no values, and the model's "
        "aren't; load the adapter"
    )


def _tied(model: nn.Module, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`base` with each tied tensor under all of its names.

    Raises:
        StructureError: `base` is no mapping of tensors, or names what the model hasn't.
    """
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
