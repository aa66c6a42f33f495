"""What is refused at a site before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..core.config import dropout_of
from ..core.errors import StructureError, UnsupportedError, nearest
from ..core.site import Site
from ..core.torch_internals import parameters_of
from ..layers.affine import is_affine
from ..layers.kinds import misfit, module_and_name
from ..layers.sharded import ADAPTED_ITSELF, check_parallel
from ..layers.weights import how_to_bake, is_packed, own_tensor
from .attachment import Attachment

__all__ = [
    "check_bias",
    "check_dense",
    "check_mergeable",
    "check_site",
    "check_substitutable",
    "check_training",
    "no_module",
]


# ----------------------------------------------------------------------------- the dense equivalent
def check_bias(module: Any, attachment: Attachment, b: Tensor | None) -> None:
    """Refuse a merged bias that has no place.

    Raises:
        UnsupportedError: the layer has no parameter for it.
    """
    if b is not None and "bias" not in parameters_of(module):
        raise UnsupportedError(
            f"{attachment.site.path!r} ({type(module).__name__}): {attachment.variant.name} "
            f"merges into a bias, and this layer has no "
            "parameter for one; leave it out with exclude_names, or keep the adapter unmerged"
        )


def check_training(module: Any, attachments: Iterable[Attachment]) -> None:
    """Refuse training where a weight stands for a method that does more in training.

    With a weight in the place of the phases there is no branch whose input could be dropped.

    Raises:
        UnsupportedError: a method asks for dropout (the message names the field), or its phases do
            more in training than its weight says.
    """
    for attachment in attachments:
        variant, cfg = attachment.variant, attachment.cfg
        if variant.beyond_weight(cfg, module.training):
            when, instead = " in training", ", or put the model in eval mode"
            if variant.beyond_weight(cfg, training=False):
                when = instead = ""
            raise UnsupportedError(
                f"{attachment.site.path!r}: what {variant.name} does{when} acts on a layer's call, "
                f"and in this model the weight itself is used here; leave the layer out with "
                f"exclude_names{instead}"
            )
        if module.training and dropout_of(cfg):
            raise UnsupportedError(
                f"{attachment.site.path!r}: {dropout_of(cfg)} acts on features that "
                f"come to a layer's call, and in this model the weight itself is used here; set "
                f"it to 0, leave the layer out with exclude_names, or put the model in eval mode"
            )


def check_dense(attachment: Attachment) -> None:
    """Refuse a method that no weight can stand for, and rows, which one weight can't serve.

    Raises:
        UnsupportedError: the method has no dense equivalent, or each row has another adapter.
    """
    if attachment.variant.weight is None and not attachment.variant.has_phases:
        raise UnsupportedError(
            f"{attachment.site.path!r}: {attachment.variant.name} has neither `inputs`, "
            f"`outputs` nor `weight` in its Variant"
        )
    if attachment.variant.weight is None:
        raise UnsupportedError(
            f"{attachment.site.path!r}: {attachment.variant.name} has no dense equivalent, so it "
            f"can't be merged there"
        )
    if attachment.row_plan is not None:
        raise UnsupportedError(
            f"{attachment.site.path!r}: the weight itself is used here, one for the whole batch, "
            f"so its rows can't have adapters of their own; "
            "leave it out with exclude_names, or call the model once per adapter"
        )


def no_module(model: nn.Module, path: str) -> StructureError:
    """The error for a site that isn't in the model."""
    known = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return StructureError(
        f"the model ({type(model).__name__}) has no module at site {path!r}; {nearest(path, known)}"
    )


def check_substitutable(module: Any, path: str, name: str) -> None:
    """Refuse a tensor in whose place an adapted one can't be put.

    Raises:
        UnsupportedError: the tensor is computed, packed or offloaded.
    """
    tensor = own_tensor(module, name)
    what = f"{path!r} ({type(module).__name__}): its {name}"
    if tensor is None:
        raise UnsupportedError(
            f"{what} is computed, not a parameter, so nothing can stand in its place; bake it in "
            f"first ({how_to_bake(module, name)})"
        )
    if name in module._buffers:
        # A buffer may hold integers, as a counter does.
        return
    check_parallel(module, path, name, ADAPTED_ITSELF)
    if is_packed(tensor):
        raise UnsupportedError(
            f"{what} is packed ({tensor.dtype}), and here it would have to be adapted itself; "
            f"use the unquantised model"
        )
    if tensor.is_meta and "_hf_hook" in module.__dict__:
        raise UnsupportedError(
            f"{what} is offloaded, and here it would have to be adapted itself; keep the module "
            f"on a device"
        )


def check_site(module: Any, site: Site) -> None:
    """Refuse a module that isn't what the adapter was made for.

    Raises:
        StructureError: the module differs; the message says what was expected and found.
    """
    wrong = misfit(site, module)
    if wrong is not None:
        raise StructureError(
            f"site {site.path!r}: expected {wrong[0]}, found {type(module).__name__} ({wrong[1]})"
        )


def check_mergeable(module: Any, site: Site, dequantize: bool = False) -> None:
    """Refuse a layer whose weight isn't a plain floating parameter.

    Raises:
        UnsupportedError: the weight is packed (and isn't to be dequantised), computed by a
            parametrization, or offloaded, or the layer does more than multiply by it.
    """
    path, name = module_and_name(site)
    if module._buffers.get(name) is not None:
        return
    weight = module._parameters.get(name)
    if weight is None:
        raise UnsupportedError(
            f"{path!r} ({type(module).__name__}): its {name} is computed, not a parameter, so "
            f"merged values have nowhere to go; bake it in first ({how_to_bake(module, name)})"
        )
    check_parallel(module, path, name, "merged values are of the whole of it")
    if is_packed(weight) and not dequantize:
        raise UnsupportedError(
            f"{path!r} ({type(module).__name__}): its {name} is packed ({weight.dtype}, shape "
            f"{tuple(weight.shape)}); merge it into a dense layer with dequantize=True, which "
            f"costs the memory that packing saves, or merge into the unquantised model"
        )
    if weight.is_meta and "_hf_hook" in module.__dict__:
        raise UnsupportedError(
            f"{path!r} ({type(module).__name__}): its {name} is offloaded, so there are no values "
            f"at hand to merge into; merge into the model before it is dispatched"
        )
    if site.kind == "linear" and not is_packed(weight) and not is_affine(module, site):
        raise UnsupportedError(
            f"{path!r} ({type(module).__name__}): its call isn't x W^T + b, so a merged weight "
            f"wouldn't give what its adapter gives around the call; adapt the weight itself "
            f"(target_parameters={path + '.weight' if path else 'weight'!r}), or don't merge"
        )
