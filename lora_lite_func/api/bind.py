"""The verbs for a kept copy of a model with adapters in it: bind, prepared, reference, unbind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..algebra.flatten import Adapters, flatten
from ..core.adapter import Adapter, leaves
from ..core.arguments import flag
from ..core.errors import StructureError, UnsupportedError
from ..core.shared import each_site
from ..core.site import Site
from ..core.stacked import PRESENT
from ..core.torch_internals import is_followed
from ..injection.attachment import Attachment
from ..injection.base_tensors import Frozen
from ..injection.bound import Entry, entries_of, keep_entries, tensors_in
from ..injection.called_linears import CalledLeaves, check_callable
from ..injection.phases import get_ready
from ..injection.state import Leaves, count_held, hold
from ..injection.tree_copy import copy_tree
from ..interop.bound_loads import teach_loading
from ..interop.bound_saves import teach_saving
from ..interop.continuous_batching import refuse_rows
from ..interop.quantised_models import tell_trainable
from ..layers.refusals import check_model
from ..layers.tied import holder_of, tied_names
from .apply import check_values

__all__ = ["ModelT", "bind", "check_untracked", "prepared", "reference", "unbind"]

ModelT = TypeVar("ModelT", bound=nn.Module)
"""The model's class, which is also the class of its copies."""

_PACKING = "init_continuous_batching"
"""The method of transformers' language models that packs requests into one row."""


def bind(model: ModelT, params: Adapters, *, linears: bool = False) -> ModelT:
    """A module of the model's own class with the adapter inside: for `generate`, a Trainer, an
    optimizer, a pipeline, an export.

    The adapter's trainable tensors are its only trainable parameters,
    `<site>.adapter.<i>.<lora_name>`, and share storage with `params`: training the bound module
    trains them. Frozen ones are buffers. Base weights share storage with the model's and don't
    require gradients. The user's model isn't changed, whatever is done to the bound one (train(),
    to(), half(), hooks ...). What its `save_pretrained` writes, if it has one, is the adapter
    alone, which `ll.load` reads. Two modules bound to one adapter move together: what a policy in
    training is compared with (DPO, GRPO, distillation) is `ll.reference(bound)`, which stays.

    Args:
        model: the frozen base; one that is bound already is adapted once more, outside what it has.
        params: as in `apply`; of `ll.rows` each call's batch has those rows.
        linears: hold lora_A and lora_B of low-rank methods as linear layers that are called, for
            tools that hook modules (opacus, curvlinops, laplace ...). Their names are
            `<site>.adapter.<i>.lora_A.weight` then. Outputs and gradients are equal up to rounding,
            at a higher cost.

    Raises:
        StructureError: a site isn't in the model, or a tensor has the wrong shape.
        UnsupportedError: the model can't be copied, `params` is what torch.func.grad or jvp
            differentiates, or was made under torch.inference_mode, or a method or layer has no such
            factors as `linears` asks for.
    """
    flag(linears, "bind: linears")
    adapters = flatten(params)
    instead = "use ll.apply(model, params, ...)"
    check_untracked((adapter for adapter, _ in adapters), "ll.bind", instead)
    check_model(model)
    for adapter, plan in adapters:
        check_values(adapter, model)
        _check_trainable(adapter)
        if linears:
            check_callable(adapter.layout, plan is not None)
    before = entries_of(model)
    tied = [tied_names(model, adapter.layout.sites.values()) for adapter, _ in adapters]
    sites: dict[str, list[Attachment]] = {}
    counts: dict[str, int] = {}
    entries = before or []
    for (adapter, plan), more in zip(adapters, tied, strict=True):
        slots: dict[str, str] = {}
        for path, attachment in _attachments(model, adapter, plan, more, counts, linears):
            slots.setdefault(path, attachment.slot)
            sites.setdefault(attachment.site.path, []).append(attachment)
        entries.append(Entry(adapter.layout, slots))
    bound = cast(ModelT, copy_tree(model, sites, Frozen()))
    for (adapter, _), more in zip(adapters, tied, strict=True):
        _hold_leaves(bound, adapter, more, CalledLeaves if linears else Leaves)
    keep_entries(bound, entries)
    tell_trainable(bound)
    teach_saving(bound)
    if before is None:
        teach_loading(bound)
    if any(plan is not None for _, plan in adapters) and hasattr(bound, _PACKING):
        bound.__dict__[_PACKING] = refuse_rows
    return bound


def _attachments(
    model: nn.Module,
    adapter: Adapter,
    plan: Any,
    tied: Mapping[str, Sequence[Site]],
    counts: dict[str, int],
    called: bool,
) -> Iterator[tuple[str, Attachment]]:
    """(a site's path in the adapter, the attachment): of each site, and of the other places of its
    tied weight.

    Args:
        model: the base.
        adapter: the adapter.
        plan: its row plan, or None.
        tied: {path: the other places}.
        counts: {a module's path: how many adapters it has}, which this counts on.
        called: whether factors are called as linear layers.
    """
    layout = adapter.layout
    for path, own in layout.sites.items():
        present = adapter._data[path].get(PRESENT)
        row_plan = None if plan is None else plan.at_site(layout, path, present)
        for site in (own, *tied.get(path, ())):
            holder = holder_of(site)
            slot = str(counts.setdefault(holder, _bound_before(model, holder)))
            counts[holder] += 1
            yield (
                path,
                Attachment(
                    layout.variant,
                    layout.config,
                    site,
                    None,
                    layout.dropout,
                    slot,
                    None,
                    row_plan,
                    optional=plan is None and present is not None,
                    called=called,
                    shared=layout.shared.get(path, ()),
                ),
            )


def _hold_leaves(
    bound: nn.Module,
    adapter: Adapter,
    tied: Mapping[str, Sequence[Site]],
    kind: type[Leaves],
) -> None:
    """Let the places of an adapter's sites in a bound model hold its tensors, by modules of that
    kind.
    """
    layout, common = adapter.layout, _shared_parameters(adapter)
    for path, tensors in each_site(layout.shared, adapter._data):
        keys = layout.shared.get(path, {}).items()
        shared = {name: common[group, name] for name, group in keys if (group, name) in common}
        held = kind(tensors, layout.specs[path], shared)
        for site in (layout.sites[path], *tied.get(path, ())):
            hold(bound.get_submodule(holder_of(site)), held)


def _shared_parameters(adapter: Adapter) -> dict[tuple[str, str], nn.Parameter]:
    """{(path of a group, lora_name): the one parameter that its sites hold}, of what is trained."""
    layout = adapter.layout
    return {
        (path, name): nn.Parameter(adapter._data[path][name].detach())
        for path, names in layout.names.items()
        for name in names
        if path not in layout.sites and layout.specs[path][name].trainable
    }


def prepared(model: ModelT, params: Adapters) -> ModelT:
    """`bind` for inference loops: what depends on the adapter alone is made once, not in every
    call.

    For methods that make something of their tensors first (DoRA's row norms, rotations of OFT, BOFT
    and SSVD, HRA's triangular factor, LoHa's product ...): one token costs what their phases cost.
    The module is a snapshot in evaluation mode: it has copies of the adapter's tensors, none
    trainable, and the base should stay as it is; `.to(device)` moves all of it. Where tensors of a
    layer are replaced, loaded, written on (in place, not through `.data`), offloaded or made
    trainable, in another dtype, in training mode, for rows of a stack and layers whose weight is
    adapted everything is made in each call as ever. A compiled call notices loading alone.

    Args:
        model: the frozen base.
        params: as in `apply`.

    Raises:
        StructureError: a site isn't in the model, or a tensor has the wrong shape.
        UnsupportedError: the model can't be copied.
    """
    with torch.inference_mode(False), torch.no_grad():
        own = pytree.tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, params)
        bound = bind(model, own).requires_grad_(False).eval()
        for module in bound.modules():
            if count_held(module):
                get_ready(module)
    return bound


def reference(bound: ModelT) -> ModelT:
    """A frozen copy of a bound model with its adapter as it is now, in evaluation mode: the
    reference that DPO, GRPO and distillation compare a policy with.

    It shares the base's storage and has copies of the adapter's tensors, so training the bound
    model doesn't move it. What tools put on the bound model (a forward of theirs, hooks) is on it
    too.

    Args:
        bound: the policy, made by `bind`.

    Raises:
        StructureError: the module wasn't made by `ll.bind`.
        UnsupportedError: the model can't be copied.
    """
    _entries(bound)
    with torch.inference_mode(False), torch.no_grad():
        made = cast(ModelT, copy_tree(bound, {}, Frozen()))
        own: dict[int, nn.Parameter] = {}
        for module in made.modules():
            if isinstance(module, Leaves):
                module.own_parameters(own)
    teach_saving(made)
    return made.requires_grad_(False).eval()


def unbind(bound: nn.Module) -> Adapter | tuple[Adapter, ...]:
    """The adapter of a bound module as it is now (a tuple, if it was bound with several); tensors
    share its storage.

    Raises:
        StructureError: the module wasn't made by `ll.bind`, or a site was taken out of it since.
    """
    found = [Adapter(entry.layout, tensors_in(bound, entry)) for entry in _entries(bound)]
    return found[0] if len(found) == 1 else tuple(found)


def _entries(bound: nn.Module) -> list[Entry]:
    entries = entries_of(bound)
    if entries is None:
        raise StructureError(f"expected a module made by ll.bind, found {type(bound).__name__}")
    return entries


def _bound_before(model: nn.Module, path: str) -> int:
    try:
        module: Any = model.get_submodule(path)
    except AttributeError:
        # copy_tree says what is wrong with the path.
        return 0
    return count_held(module)


def _check_trainable(adapter: Adapter) -> None:
    """Refuse tensors that torch makes no parameters of.

    Raises:
        UnsupportedError: the message names the first.
    """
    if torch.is_inference_mode_enabled():
        return
    for path, tensors in adapter._data.items():
        for name, t in tensors.items():
            if (
                isinstance(t, Tensor)
                and t.is_inference()
                and adapter.layout.specs[path][name].trainable
            ):
                raise UnsupportedError(
                    f"ll.bind: {path!r} {name} was made under torch.inference_mode, and torch "
                    f"trains no such tensor; make the adapter outside of it, or copy it: "
                    f"torch.utils._pytree.tree_map(torch.clone, params)"
                )


def check_untracked(adapters: Iterable[Adapter], what: str, instead: str) -> None:
    """Refuse tensors that torch.func.grad or jvp follows where they become parameters.

    A parameter carries no gradient back to them.

    Raises:
        UnsupportedError: such a tensor is there; the message says what to do instead.
    """
    if any(is_followed(t) for a in adapters for t in leaves(a) if isinstance(t, Tensor)):
        raise UnsupportedError(
            f"{what} makes parameters of its own, and inside torch.func.grad or jvp no gradient "
            f"comes through them; {instead}"
        )
