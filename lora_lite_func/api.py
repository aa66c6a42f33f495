"""The verbs that put an adapter to a model: apply, functional_call, bind, unbind, merge, merged. Nothing here writes on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .adapter import Adapter, Layout, check_shapes, leaves, members_of
from .errors import StructureError, UnsupportedError, nearest
from .hidden import Prompt, Prompted, known, tell
from .kinds import reads_prompt
from .layers import check_model
from .ops import Leaves, Op, held_by, hold, leaves_at
from .plan import Plan
from .rows import Rows
from .site import get_ready
from .skeleton import constant, copy_tree, own_bias, own_buffers
from .spec import Site
from .tied import everywhere, home_of, twins

__all__ = ["Adapters", "Frozen", "apply", "bind", "check_untracked", "flatten", "functional_call", "ops_of", "prepared", "unbind"]

Adapters = Adapter | Rows | Sequence["Adapters"] | Mapping[str, "Adapters"]
"""One Adapter (or `ll.rows(stack, ids)`), or a tuple, list or dict of them, applied in order."""


# --------------------------------------------------------------------------------------------------------------- apply
def apply(model: nn.Module, params: Adapters | Prompted, /, *args: Any, **kwargs: Any) -> Any:
    """The model's output with the adapter in: `y = ll.apply(model, params, x)`.

    The base is a constant, whatever its requires_grad says: gradients reach `params` and the arguments alone. Works under every
    torch.func transform, in threads, under torch.compile(fullgraph=True).

    Args:
        model: the frozen base; never written.
        params: an Adapter, or a tuple, list or dict of them, applied in order: `apply(model, (p1, p2), x)` is
            `apply(merged(model, p1), p2, x)`. An empty one is the bare base.
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
        base: {parameter or buffer name: tensor} to use instead of the model's own; gradients reach these.

    Raises:
        StructureError: as `apply`; or `base` names what the model hasn't.
    """
    args, kwargs = args if isinstance(args, tuple) else (args,), kwargs or {}
    adapters, prompt = known(params, model, args, kwargs)
    skeleton = copy_tree(model, everywhere(model, ops_of(adapters, prompt, model)), _Constant(model, base))
    return skeleton(*args, **kwargs)


def flatten(params: Adapters) -> list[tuple[Adapter, Plan | None]]:
    """The adapters in order, checked; with a plan a stack, of which each row has its own.

    Raises:
        StructureError: something that isn't an adapter, or a tensor of the wrong shape.
    """
    if isinstance(params, Adapter):
        check_shapes(params)
        return [(params, None)]
    if isinstance(params, Rows):
        if members_of(params.stack, "rows") != params.plan.members:
            raise StructureError(f"rows: made for {params.plan.members} members, found {members_of(params.stack, 'rows')}")
        return [(params.stack, params.plan)]
    if isinstance(params, (tuple, list, Mapping)):
        parts: Iterable[Any] = params.values() if isinstance(params, Mapping) else params
        return [adapter for part in parts for adapter in flatten(part)]
    swapped = "; the model comes first, then its adapter" if isinstance(params, nn.Module) else ""
    raise StructureError(f"expected an Adapter, or a tuple, list or dict of them, found {type(params).__name__}{swapped}")


def ops_of(params: Adapters, prompt: Callable[[], Prompt] = Prompt, model: nn.Module | None = None) -> dict[str, list[Op]]:
    """{path: the adapters there, in order}. Frozen tensors are constants: they get no gradient.

    Raises:
        StructureError: as `flatten`; or the tensors have no values, and the model's (if it is given) have.
    """
    sites: dict[str, list[Op]] = {}
    constant = torch.is_grad_enabled()
    for adapter, plan in flatten(params):
        _check_values(adapter, model)
        layout = adapter.layout
        variant, cfg = layout.variant, layout.config
        dropout = getattr(cfg, "dropout", 0.0)
        asked = prompt() if reads_prompt(variant) else None
        for path, tensors in adapter._data.items():
            if constant:
                trainable = layout.trainable[path]
                tensors = {name: t if trainable[name] else t.detach() for name, t in tensors.items()}
            sites.setdefault(path, []).append(Op(variant, cfg, layout.sites[path], tensors, dropout, 0, asked, plan))
    return sites


def _check_values(adapter: Adapter, model: nn.Module | None) -> None:
    """Refuse an adapter on the meta device for a model that isn't: torch lets such tensors meet, and gives garbage."""
    first = next(leaves(adapter), None)
    if not isinstance(first, Tensor) or not first.is_meta or model is None or all(p.is_meta for p in model.parameters()):
        return
    raise StructureError("the adapter's tensors are on the meta device, so they have no values, and the model's aren't; load the adapter")


def check_untracked(params: Adapters, what: str, instead: str) -> None:
    """Refuse tensors that torch.func.grad or jvp follows where they become parameters, which carry no gradient back.

    Raises:
        UnsupportedError: with what to do instead.
    """
    if any(_tracked(t) for adapter, _ in flatten(params) for t in leaves(adapter) if isinstance(t, Tensor)):
        raise UnsupportedError(
            f"{what} makes parameters of its own, and inside torch.func.grad or jvp no gradient comes through them; {instead}"
        )


def _tracked(t: Tensor) -> bool:
    levels: Any = torch._C._functorch
    while levels.is_functorch_wrapped_tensor(t):
        if levels.is_gradtrackingtensor(t):
            return True
        t = levels.get_unwrapped(t)
    return False


class _Constant:
    """What a copy holds in `apply`: the base's own tensors as constants, or those of `base` in their place."""

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
                if p is not None and p.requires_grad and not (self.base and p is self.base.get(f"{path}.{name}" if path else name)):
                    parameters[name] = constant(p, copy)


def _tied(model: nn.Module, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`base` with every name of a tied tensor that it names once."""
    known: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    if not isinstance(base, Mapping):
        raise StructureError(f"base: expected {{parameter or buffer name: tensor}}, found {type(base).__name__}")
    for name, tensor in base.items():
        if name not in known:
            raise StructureError(f"base: {type(model).__name__} has no parameter or buffer {name!r}; {nearest(name, known)}")
        if not isinstance(tensor, Tensor):
            raise StructureError(f"base {name!r}: expected a tensor, found {type(tensor).__name__}")
        if tensor.shape != known[name].shape:
            raise StructureError(f"base {name!r}: expected shape {tuple(known[name].shape)}, found {tuple(tensor.shape)}")
    by_tensor = {id(known[name]): tensor for name, tensor in base.items()}
    return {name: base.get(name, by_tensor[id(t)]) for name, t in known.items() if id(t) in by_tensor}


# ---------------------------------------------------------------------------------------------------------------- bind
def bind(model: nn.Module, params: Adapters) -> nn.Module:
    """A module of the model's own class with the adapter inside: for `generate`, a Trainer, an optimizer, a pipeline, an export.

    The adapter's trainable tensors are its only trainable parameters, `<site>.adapter.<i>.<lora_name>`, and share storage with
    `params`: training the bound module trains them. Frozen ones are buffers. Base weights share storage with the model's and don't
    require gradients. The user's model isn't changed, whatever is done to the bound one (train(), to(), half(), hooks ...).

    Raises:
        StructureError: a site isn't in the model, or a tensor has the wrong shape.
        UnsupportedError: the model can't be copied, or `params` is what torch.func.grad or jvp differentiates.
    """
    check_untracked(params, "ll.bind", "use ll.apply(model, params, ...)")
    adapters = flatten(params)
    check_model(model)
    for adapter, _ in adapters:
        _check_values(adapter, model)
    sites: dict[str, list[Op]] = {}
    counts: dict[str, int] = {}
    homes: list[tuple[Layout, dict[str, int]]] = list(model.__dict__.get("_ll_bound", ()))
    for adapter, plan in adapters:
        layout = adapter.layout
        indices: dict[str, int] = {}
        more = twins(model, layout.sites.values())
        for path, own in layout.sites.items():
            for site in (own, *more.get(path, ())):
                home = home_of(site)
                slot = counts.setdefault(home, _bound_before(model, home))
                counts[home] += 1
                indices.setdefault(path, slot)
                op = Op(layout.variant, layout.config, site, None, getattr(layout.config, "dropout", 0.0), slot, None, plan)
                sites.setdefault(site.path, []).append(op)
        homes.append((layout, indices))
    bound = copy_tree(model, sites, Frozen())
    for adapter, _ in adapters:
        more = twins(model, adapter.layout.sites.values())
        for path, tensors in adapter._data.items():
            held = Leaves(tensors, adapter.layout.trainable[path])
            for site in (adapter.layout.sites[path], *more.get(path, ())):
                hold(bound.get_submodule(home_of(site)), held)
    bound.__dict__["_ll_bound"] = homes
    if any(reads_prompt(layout.variant) for layout, _ in homes):
        tell(bound)
    return bound


def prepared(model: nn.Module, params: Adapters) -> nn.Module:
    """`bind` for inference loops: what depends on the adapter alone is made once, not in every call.

    For methods that make something of their tensors first (DoRA's row norms, rotations of OFT, BOFT and SSVD, HRA's triangular factor,
    LoHa's product ...): one token costs what their phases cost. The module is a snapshot in evaluation mode: it has copies of the
    adapter's tensors, none trainable, and the base should stay as it is; `.to(device)` moves all of it. Where tensors of a layer are
    replaced, loaded, written on (in place, not through `.data`), offloaded or made trainable, in another dtype, in training mode, for rows
    of a stack and layers whose weight is adapted everything is made in each call as ever. A compiled call notices loading alone.

    Raises:
        StructureError: a site isn't in the model, or a tensor has the wrong shape.
        UnsupportedError: the model can't be copied.
    """
    with torch.inference_mode(False), torch.no_grad():
        own = pytree.tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, params)
        bound = bind(model, own).requires_grad_(False).eval()
        for module in bound.modules():
            if held_by(module):
                get_ready(module)
    return bound


def unbind(bound: nn.Module) -> Adapter | tuple[Adapter, ...]:
    """The adapter of a bound module as it is now (a tuple, if it was bound with several); tensors share its storage.

    Raises:
        StructureError: the module wasn't made by `ll.bind`, or a site was taken out of it since.
    """
    homes: Iterable[tuple[Layout, dict[str, int]]] | None = getattr(bound, "__dict__", {}).get("_ll_bound")
    if homes is None:
        raise StructureError(f"expected a module made by ll.bind, found {type(bound).__name__}")
    found = []
    for layout, indices in homes:
        held = {path: _held(bound, layout.sites[path], i) for path, i in indices.items()}
        found.append(Adapter(layout, {path: {name: t.detach() for name, t in tensors.items()} for path, tensors in held.items()}))
    return found[0] if len(found) == 1 else tuple(found)


def _held(bound: nn.Module, site: Site, index: int) -> dict[str, Tensor]:
    try:
        return leaves_at(bound.get_submodule(home_of(site)), index).tensors()
    except (AttributeError, KeyError):
        raise StructureError(f"site {site.path!r}: the module there isn't the one that was bound, its adapter went with that") from None


def _bound_before(model: nn.Module, path: str) -> int:
    try:
        module: Any = model.get_submodule(path)
    except AttributeError:
        return 0  # copy_tree says what is wrong with the path
    return held_by(module)


class Frozen:
    """What a kept copy holds: new parameters on the base's storage that don't require gradients; tied ones stay tied."""

    def __init__(self, keep_flags: bool = False) -> None:
        self.made: dict[int, nn.Parameter] = {}
        self.keep_flags = keep_flags

    def __call__(self, copy: nn.Module, path: str) -> None:
        parameters = copy._parameters
        for name, p in parameters.items():
            if type(p) is nn.Parameter or (p is not None and p.requires_grad and is_traceable_wrapper_subclass(p)):
                # another kind of parameter, of a quantised layer, stays the object it is
                if id(p) not in self.made:
                    grad = p.requires_grad and self.keep_flags
                    self.made[id(p)] = nn.Parameter(p.detach(), requires_grad=grad)
                parameters[name] = self.made[id(p)]
        own_buffers(copy)
