"""What a site's copy does: the activation route wraps the layer's forward, the weight route calls it on adapted tensors.

A site's copy is an instance of a subclass of the layer's own class, so it keeps isinstance, hooks, flags and attributes.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batching import by_rows, undisturbed
from .errors import UnsupportedError
from .hidden import hidden_state, tokens_of
from .kinds import KINDS
from .layers import at_trace_time, is_packed
from .lookup import bounded, padded, rows
from .ops import Held, Op, check_bias, check_dropout, merge_site, tensors_at, unfolded
from .plain import linear
from .reading import Adapted, enter, inside, leave
from .ready import kept, moved, ready_at, stamped
from .rebind import BINDABLE, rebound, twin
from .spec import Params, Site
from .splitting import Chains, Within, by_adapters, narrowed
from .underneath import Underneath

__all__ = ["Op", "flatten_again", "get_ready", "merge_site", "site_class"]


# ------------------------------------------------------------------------------------------------ the activation route
def _linear(self: Any, input: Tensor) -> Any:
    """nn.Linear's own call with the adapters in."""
    op = self._ll_only
    if op is not None and not torch.compiler.is_compiling():
        made = linear(self, op, input)
        if made is not None:
            return made
    return _forward(self, input)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The frozen layer with the adapters' phases around it.

    The layer's own class works on a plain twin, an object with the very attributes of the site: so it reads its stored tensors.
    """
    attributes = self.__dict__
    own = "_ll_frozen" in attributes or "forward" in attributes or "_ll_slots" in attributes  # e.g. accelerate's wrapper around this call
    if self._ll_twin and not own and not torch.compiler.is_compiling():
        twin = object.__new__(self._ll_base)
        object.__setattr__(twin, "__dict__", attributes)
        return _call(self, twin, twin.forward, args, kwargs)
    enter(self)
    try:
        return _call(self, self, self._ll_frozen, args, kwargs)
    finally:
        leave(self)


def _call(self: Any, module: Any, layer: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    ops = self._ll_ops
    if len(args) == 1 and not kwargs:
        return _phases(ops, len(ops), layer, module, args[0])
    if not args and not kwargs:
        return layer()  # to say itself what is missing
    name = None if args else _input_name(self._ll_base, tuple(kwargs))
    rest = args[1:]

    def frozen(x: Tensor) -> Any:
        return layer(x, *rest, **kwargs) if name is None else layer(**{**kwargs, name: x})

    return _phases(ops, len(ops), frozen, module, args[0] if name is None else kwargs[name])


@at_trace_time
def _input_name(cls: type[nn.Module], given: tuple[str, ...]) -> str:
    """Which of the keywords of a layer's call is its input: the first that its forward lists."""
    return next((name for name in inspect.signature(cls.forward).parameters if name in given), given[0])


class _Lookup(nn.Embedding):
    """What a site's copy inherits between an embedding's own class and nn.Embedding."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """The frozen look-up with the adapters' phases around it; x is the ids."""
        seen: list[Tensor] = []

        def frozen(ids: Tensor) -> Tensor:
            seen.append(rows(self, ids) if self.max_norm is not None else self._ll_frozen(ids))
            return seen[-1]

        enter(self)
        try:
            y = _phases(self._ll_ops, len(self._ll_ops), frozen, self, input)
        finally:
            leave(self)
        y = padded(self, input, y, seen[-1])
        return y if self.max_norm is None else bounded(y, self)


def _phases(ops: Sequence[Op], count: int, frozen: Callable[[Tensor], Any], module: Any, x: Tensor) -> Any:
    """The layer as its first `count` adapters leave it; a later one is outside an earlier one, as merging in order would have it."""
    if count == 0:
        return frozen(x)
    op = ops[count - 1]
    variant, cfg, site = op.variant, op.cfg, op.site
    if op.plan is not None:
        return _rows(ops, count, frozen, module, x)
    p, site = unfolded(tensors_at(op, module), site)
    d = None
    if variant.prepare is not None:
        ready = ready_at(op, module)
        d = prepare(ops, count - 1, module, p, site, x.device.type) if ready is None else ready[0]
    inner = x if variant.inputs is None else variant.inputs(cfg, p, d, x, site)
    y = frozen(inner) if count == 1 else _phases(ops, count - 1, frozen, module, inner)
    if variant.outputs is None:
        return y
    if KINDS[site.kind].listed:  # a whole module: what comes to the phase is where its hidden state has the prompt
        h, put, x = _hidden(op, y, x)
        return put(variant.outputs(cfg, p, d, x, h, site))
    if not isinstance(y, Tensor):
        raise UnsupportedError(
            f"{site.path!r} ({type(module).__name__}): expected a tensor from the layer's call, found {type(y).__name__}; leave it out "
            f"with exclude_names, or adapt its weight (target_parameters), or take a method that changes the input alone (HRA)"
        )
    if op.dropout and module.training:
        x = F.dropout(x, op.dropout)
    return variant.outputs(cfg, p, d, x, y, site)


def prepare(ops: Sequence[Op], under: int, module: Any, p: Params, site: Site, device: str) -> Any:
    """What a method's phases share, of the adapter with `under` others before it."""
    op = ops[under]
    return undisturbed(device, op.variant.prepare, op.cfg, p, site, Underneath(ops, under, module, p, _phases))  # type: ignore[arg-type]


def get_ready(site: Any) -> None:
    """Make once what the phases of a bound site's adapters share, from its tensors as they are now."""
    made: dict[int, tuple[Any, Any]] = {}
    enter(site)
    try:
        for i, op in enumerate(site._ll_ops):
            variant = op.variant
            if op.plan is not None or (variant.prepare is None and variant.factors is None):
                continue
            p, at = unfolded(tensors_at(op, site), op.site)
            d = None if variant.prepare is None else prepare(site._ll_ops, i, site, p, at, next(iter(p.values())).device.type)
            factors = None if variant.factors is None else variant.factors(op.cfg, p, at)
            if d is not None or (factors is not None and not all(any(f is t for t in p.values()) for f in factors[:2])):
                made[op.slot] = (d, factors)  # not where the factors are the adapter's own tensors
    finally:
        leave(site)
    site.__dict__["_ll_ready"] = stamped(site, made)


def _rows(ops: Sequence[Op], count: int, frozen: Callable[[Tensor], Any], module: Any, x: Tensor) -> Any:
    """`_phases` where the outermost adapter is another one for each row."""
    op = ops[count - 1]
    p = tensors_at(op, module)
    layer = Underneath(ops, count - 1, module, p, _phases)
    return by_rows(op, p, layer, module.training, lambda x: _phases(ops, count - 1, frozen, module, x), _hidden, x)


def _hidden(op: Op, y: Any, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Any], Tensor]:
    """(what the phase changes, how to put it back, what it gets for x) of a layer's output: of a whole module's its hidden state."""
    if not KINDS[op.site.kind].listed:
        return y, lambda h: h, x
    h, put = hidden_state(y, op.site.path, op.site.d_out)
    return h, put, tokens_of(h, op.prompt, op.site.path)


# ---------------------------------------------------------------------------------------------------- the weight route
def _substituted(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The module's own call on its adapted tensors; where rows have adapters of their own, once for each of those."""
    chains = _chains(self)
    if all(op.plan is None for ops in chains.values() for op in ops):
        return _on_adapted(self, chains, args, kwargs)

    def home(key: tuple[str, str]) -> Any:
        return self._modules[key[0]] if key[0] else self

    def call(chains: Chains, args: tuple[Any, ...], kwargs: dict[str, Any], within: Within | None = None) -> Any:
        return _on_adapted(self, chains, args, kwargs, within)

    return by_adapters(self, chains, home, call, args, kwargs)


def _chains(site: Any) -> Chains:
    """{(name of the child that holds it, or "", name of a tensor): the adapters that go into it} of all that a site substitutes."""
    own = {("", name): ops for name, ops in site._ll_subs.items()}
    return own | {(child, name): ops for child in site._ll_inner for name, ops in site._modules[child]._ll_subs.items()}


def _on_adapted(self: Any, chains: Chains, args: tuple[Any, ...], kwargs: dict[str, Any], within: Within | None = None) -> Any:
    """The call on tensors with the adapters of `chains` in; what the module notes on itself stays noted."""
    made = _concrete(self, chains)
    if within is not None:
        made.__dict__["_modules"] = narrowed(made, within)
    if torch.compiler.is_compiling():
        return made.forward(*args, **kwargs)
    before = dict(made.__dict__)
    try:
        return made.forward(*args, **kwargs)
    finally:
        for name, value in made.__dict__.items():
            if before.get(name, before) is not value and not name.startswith("_flat_weight"):
                self.__dict__[name] = value


def _concrete(site: Any, chains: Chains) -> Any:
    """A site for the length of one call: of the layer's own class, the adapted tensors computed once and in place as plain ones."""
    made = twin(site, site._ll_base)
    attributes = made.__dict__
    attributes["_parameters"] = {**site._parameters, **_adapted(site, chains)}
    if attributes.get("max_norm") is not None:  # torch bounds the table in place: let it be a table of this call's own
        attributes["_parameters"]["weight"] = attributes["_parameters"]["weight"].clone()
    inner = attributes["_ll_inner"]
    if inner:
        held = {name: {("", tensor): ops for (child, tensor), ops in chains.items() if child == name} for name in inner}
        attributes["_modules"] = {**site._modules, **{name: _concrete(site._modules[name], held[name]) for name in inner}}
    own = attributes.pop("_ll_own", None)
    if own is not None:  # what an instance carried as its forward, and whatever else is bound to it, works on this one
        attributes["forward"] = own
        for name, value in attributes.items():
            if isinstance(value, BINDABLE):
                attributes[name] = rebound(value, {id(site): made}, 0)
    flatten_again(made)
    return made


def flatten_again(module: Any) -> None:
    """A recurrent layer's flat list of its tensors, as they are now."""
    attributes = module.__dict__
    if "_flat_weights" in attributes:
        flat = [attributes["_parameters"].get(name) for name in attributes["_flat_weights_names"]]
        attributes["_flat_weights"] = flat
        attributes["_flat_weight_refs"] = [None if p is None else weakref.ref(p) for p in flat]


def _adapted(module: Any, chains: Chains) -> dict[str, Tensor]:
    """{name: tensor} of a module with its adapters in."""
    made: dict[str, Tensor] = {}
    for (child, name), ops in chains.items():
        if child or not ops:
            continue
        check_dropout(module, ops)
        pair = not KINDS[ops[0].site.kind].bare
        bias = module._parameters.get("bias") if pair else None
        W, b = merge_site(module, ops, module._parameters[name], bias)
        made[name] = W
        if b is not None:
            check_bias(module, ops[-1], b)
            made["bias"] = b
    return made


def _read(name: str) -> property:
    """What `site.weight` or `.bias` is: the layer's own inside its own call, else the adapted one, made when it is used."""

    def get(self: Any) -> Any:
        found = _own(self, name)
        if found is _NONE:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if inside(self):
            return found
        weight = _own(self, "weight")
        if not isinstance(weight, Tensor) or is_packed(weight) or weight.is_meta:
            return found  # packed or put away: nothing that an adapter could go into
        return _lazily(self._ll_path, name, found, lambda: _merged(self, weight, name))

    def put(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, put)


def _read_substituted(name: str) -> property:
    """What a substituted tensor is to who reads it without calling the module."""

    def get(self: Any) -> Any:
        found = self._parameters.get(name)
        return _lazily(self._ll_path, name, found, lambda: _adapted(self, _chains(self)).get(name, found))

    return property(get)


def _lazily(path: str, name: str, found: Tensor | None, make: Callable[[], Any]) -> Any:
    if found is None or torch.compiler.is_compiling():
        return make()
    return Adapted(f"{path}.{name}" if path else name, found, make)


_NONE = object()


def _own(self: Any, name: str) -> Any:
    """A layer's tensor as the layer sees it: computed by its class's own property, stored, or set on it by a hook."""
    attributes = self.__dict__
    if name in self._ll_computed:
        return getattr(self._ll_base, name).__get__(self)
    if name in attributes["_parameters"]:
        return attributes["_parameters"][name]
    if name in attributes:
        return attributes[name]
    if name in attributes["_buffers"]:
        return attributes["_buffers"][name]
    return _NONE


def _merged(self: Any, weight: Tensor, name: str) -> Any:
    check_dropout(self, self._ll_ops)
    bias = _own(self, "bias")
    return merge_site(self, self._ll_ops, weight, None if bias is _NONE else bias)[name == "bias"]


# --------------------------------------------------------------------------------------------------------- site classes
@at_trace_time
def site_class(cls: type[nn.Module], active: bool, names: tuple[str, ...] | None) -> type[nn.Module]:
    """The subclass that a site's copy is an instance of; made once per class.

    Args:
        cls: the layer's own.
        active: phases go around its call.
        names: the tensors that are substituted; None if the call isn't touched for that.
    """
    key = (cls, active, names)
    if key not in _CLASSES:
        body: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        body |= {"__reduce_ex__": _reduce_site, "_ll_base": cls, "_ll_key": key}
        computed = tuple(name for name in ("weight", "bias") if isinstance(getattr(cls, name, None), property))
        body["_ll_computed"] = computed
        plain = names is None and cls.forward is nn.Linear.forward and not computed
        body |= {name: _read_substituted(name) for name in names or ()}
        bases: tuple[type, ...] = (cls,)
        if active and issubclass(cls, nn.Embedding):
            bases = (_Lookup,) if cls is nn.Embedding else (cls, _Lookup)
            body["_ll_frozen"] = nn.Embedding.forward
        elif active:
            body |= {"forward": _linear if plain else _forward, "_ll_twin": names is None}
            body["_ll_frozen"] = cls.forward if names is None else _substituted
        else:
            body["forward"] = cls.forward if names is None else _substituted
        if issubclass(cls, nn.RNNBase):  # after a .to(): nothing here is to be flattened, the call's own copy is
            body |= {"_init_flat_weights": flatten_again, "flatten_parameters": lambda self: None}
        if getattr(cls, "__iter__", None) in (nn.Sequential.__iter__, nn.ModuleList.__iter__):
            body |= {"__iter__": lambda self: iter(_links(self)), "__len__": lambda self: len(_links(self)), "_ll_twin": False}
        if active:
            body |= {"_apply": moved, "__setstate__": _restored, "_load_from_state_dict": _loaded}
            own = (name for name in (("weight",) if _Lookup in bases else ("weight", "bias")) if name not in body)
            body |= {name: _read(name) for name in own if isinstance(getattr(cls, name, None), (property, type(None)))}
        _CLASSES[key] = type(cls.__name__, bases, body)
    return _CLASSES[key]


_CLASSES: dict[tuple[type[nn.Module], bool, tuple[str, ...] | None], type[nn.Module]] = {}


def _reduce_site(self: Any, protocol: Any) -> tuple[Any, ...]:
    state = {name: value for name, value in self.__dict__.items() if name != "_flat_weight_refs"}  # made again by a recurrent layer
    return _new_site, self._ll_key, {**state, "_ll_ready": kept(self)}


def _links(self: Any) -> list[Any]:
    """The layers of a list of layers, which are all but its adapters."""
    return [child for child in self._modules.values() if type(child) is not Held]


def _loaded(self: Any, *args: Any) -> None:
    self.__dict__["_ll_ready"] = None  # a compiled call sees no writes, but this
    self._ll_base._load_from_state_dict(self, *args)


def _restored(self: Any, state: dict[str, Any]) -> None:
    self._ll_base.__setstate__(self, state)
    made = self.__dict__["_ll_ready"]
    self.__dict__["_ll_ready"] = None if made is None else stamped(self, made)


def _new_site(cls: type[nn.Module], active: bool, names: tuple[str, ...] | None) -> nn.Module:
    made = site_class(cls, active, names)
    return made.__new__(made)
