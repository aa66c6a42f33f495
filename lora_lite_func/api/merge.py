"""merge and merged: the dense weights with an adapter in them. Nothing here writes on the model."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..algebra.flatten import Adapters, flatten
from ..core.errors import UnsupportedError
from ..injection.attachment import everywhere
from ..injection.base_tensors import Frozen, parameter_like
from ..injection.checks import check_bias, check_dense, check_mergeable, check_site, no_module
from ..injection.dense_weight import merge_site
from ..injection.tree_copy import copy_tree
from ..interop.bound_saves import teach_saving
from ..interop.quantised_models import declared_dtype, forget_packing
from ..layers.kinds import module_and_name
from ..layers.quantised import dequantised, unpacked
from ..layers.refusals import check_model
from ..layers.tied import embeddings_of, tied_names
from ..layers.weights import compute_dtype, is_linear_like, is_packed, own_tensor
from .apply import attachments_of
from .bind import ModelT, check_untracked

__all__ = ["merge", "merged"]


def merge(model: nn.Module, params: Adapters, *, dequantize: bool = False) -> dict[str, Tensor]:
    """{parameter name: tensor}: the dense weights (and biases) with the adapter in, for the sites'
    parameters alone.

    Pure and differentiable in `params`. Sums are taken in float32 at least and returned in the
    weight's dtype. A method that moves the bias gives a `<site>.bias` even where the layer had
    none.

    Args:
        model: the frozen base.
        params: as in `apply`.
        dequantize: give packed (quantised) layers dense weights, in the dtype that they compute in.
            That costs the memory that packing saved (4 bytes an entry in float32, against 1 or
            1/2), and the weight keeps the rounding of its packing. Where a layer rounds its inputs
            too (bitsandbytes' 8 bits), the dense one is as far from it as that rounding.

    Raises:
        StructureError: a site isn't in the model, or a tensor has the wrong shape.
        UnsupportedError: the method has no dense equivalent, or the layer no dense weight.
    """
    sites = attachments_of(params, model=model)
    check_model(model)
    merged_tensors: dict[str, Tensor] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for attachments in everywhere(model, sites).values():
        module_path, name = module_and_name(attachments[-1].site)
        module: Any = modules.get(module_path)
        if module is None:
            raise no_module(model, module_path)
        for attachment in attachments:
            check_site(module, attachment.site)
            check_dense(attachment)
        check_mergeable(module, attachments[-1].site, dequantize)
        bias = (
            module.bias.detach() if attachments[0].site.bias and module.bias is not None else None
        )
        W, b = merge_site(module, attachments, _plain(module, name), bias)
        prefix = module_path + "." if module_path else ""
        # The weight is stored as the base's is, because files need that.
        own = own_tensor(module, name)
        plain = own is None or is_packed(own) or own.is_contiguous()
        merged_tensors[prefix + name] = W.contiguous() if plain else W
        if b is not None and b is not bias:
            check_bias(module, attachments[-1], b)
            merged_tensors[prefix + "bias"] = b
    return merged_tensors


def merged(model: ModelT, params: Adapters, *, dequantize: bool = False) -> ModelT:
    """A plain module of the model's class with the merged weights: base speed, no adapter. The
    user's model isn't changed.

    Parameters that no site touches share storage with the model's (`copy.deepcopy` it for
    independence). Flags stay as they were. With `dequantize` every packed layer becomes a dense
    one, at the cost that `merge` tells, and a model of transformers says that it isn't quantised
    any more.

    Args:
        model: the frozen base.
        params: as in `apply`.
        dequantize: as in `merge`.

    Raises:
        StructureError, UnsupportedError: as `merge`; `params` is what torch.func.grad or jvp
            differentiates; or, with `dequantize`, the packing of a layer can't be read.
    """
    adapters = [adapter for adapter, _ in flatten(params)]
    check_untracked(
        adapters,
        "ll.merged",
        "use ll.functional_call(model, (), args, base=ll.merge(model, params)), or ll.apply",
    )
    new = merge(model, params, dequantize=dequantize)
    # Tied parameters stay tied.
    adapted = (site for adapter in adapters for site in adapter.layout.sites.values())
    for path, others in tied_names(model, adapted).items():
        new |= {site.path: new[path] for site in others}
    kept: dict[int, nn.Parameter] = {}
    made: Any = copy_tree(model, {}, Frozen(keep_flags=True))
    for name, tensor in new.items():
        path, _, leaf = name.rpartition(".")
        module = made.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor.detach()
            continue
        old = module._parameters.get(leaf)
        if leaf == "weight" and old is not None and is_packed(old):
            made = _with_dense(made, path, tensor)
            continue
        if id(tensor) not in kept:
            values = tensor.detach()
            if old is None:
                kept[id(tensor)] = nn.Parameter(values)
            else:
                kept[id(tensor)] = parameter_like(old, values, old.requires_grad)
        module.register_parameter(leaf, kept[id(tensor)])
    if dequantize:
        made = _without_packing(made)
    _tell_untied(made, model)
    teach_saving(made)
    return made


def _without_packing(made: Any) -> Any:
    """The model with dense layers in place of the packed ones that no adapter is on."""
    for path, module in list(made.named_modules()):
        weight = module._parameters.get("weight") if is_linear_like(module) else None
        if weight is not None and is_packed(weight):
            try:
                values = _plain(module, "weight")
            except UnsupportedError as error:
                raise UnsupportedError(f"{path!r}: {error}") from None
            made = _with_dense(made, path, values)
    if not any(is_packed(p) for p in made.parameters()):
        forget_packing(made)
    return made


def _with_dense(made: Any, path: str, weight: Tensor) -> Any:
    """The model with a dense layer of this weight in place of a packed one."""
    module = made.get_submodule(path)
    weight = weight.to(declared_dtype(made) or weight.dtype)
    bias = module._parameters.get("bias")
    dense = unpacked(module, weight, None if bias is None else bias.detach().to(weight.dtype))
    return _put(made, path, dense)


def _tell_untied(made: Any, model: Any) -> None:
    """Correct a config that says that the head is the table, where merging has untied them.

    What loads the saved model would believe the config. The base's config isn't changed.
    """
    config = getattr(made, "config", None)
    table, head = (getattr(embeddings_of(made, end), "weight", None) for end in ("input", "output"))
    apart = table is not None and head is not None and table is not head
    if not apart or not getattr(config, "tie_word_embeddings", False):
        return
    if config is getattr(model, "config", None):
        config = made.config = copy.deepcopy(config)
    inner: Any = getattr(config, "get_text_config", lambda: config)()
    both: tuple[Any, ...] = (config, inner)
    for says in both:
        if getattr(says, "tie_word_embeddings", False):
            says.tie_word_embeddings = False


def _plain(module: Any, name: str) -> Tensor:
    """A parameter's values as a plain tensor.

    The values of a packed parameter are in the dtype in which its layer computes.
    """
    if name in module._buffers:
        buffer: Tensor = module._buffers[name]
        return buffer
    stored: Tensor = module._parameters[name]
    if not is_packed(stored):
        return stored.detach()
    return dequantised(module, stored).to(compute_dtype(module, name))


def _put(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put a module at a path of the tree, wherever the module that was there is."""
    if not path:
        return module
    old = root.get_submodule(path)
    for holder in root.modules():
        for name, child in holder._modules.items():
            if child is old:
                holder._modules[name] = module
    return root
