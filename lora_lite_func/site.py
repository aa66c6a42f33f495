"""What a site's copy does: the activation route wraps the layer's forward, the weight route answers `.weight` and `.bias`.

A site's copy is an instance of a subclass of the layer's own class, so it keeps isinstance, hooks, flags and attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import AdapterConfig
from .errors import UnsupportedError
from .layers import at_trace_time, compute_dtype, is_dense
from .reading import Adapted, enter, inside, leave
from .spec import Params, Site, Variant

__all__ = ["Leaves", "Op", "hold", "leaves_at", "merge_site", "site_class"]

_CHILD = "adapter"  # the name under which a bound site holds its adapters' tensors


class Op(NamedTuple):
    """One adapter at one site. `p` is None where the site itself holds the tensors (a bound model): its `slot`-th child."""

    variant: Variant
    cfg: AdapterConfig
    site: Site
    p: Params | None
    dropout: float
    slot: int = 0


class Leaves(nn.Module):
    """The tensors of one adapter at one site of a bound model: trainable ones as parameters, frozen ones as buffers."""

    def __init__(self, tensors: Mapping[str, Tensor], trainable: Mapping[str, bool]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if trainable[name]:
                self.register_parameter(name, nn.Parameter(tensor.detach()))
            else:
                self.register_buffer(name, tensor.detach())

    def tensors(self) -> dict[str, Tensor]:
        """{lora_name: tensor}."""
        return {**self._parameters, **self._buffers}  # type: ignore[dict-item]


def leaves_at(site: Any, index: int) -> Leaves:
    """The tensors that a bound site holds for its `index`-th adapter."""
    return site._modules[_CHILD]._modules[str(index)]


def hold(site: Any, leaves: Leaves) -> None:
    """Put one more adapter's tensors into a bound site.

    Raises:
        UnsupportedError: the layer has something of its own under the name needed.
    """
    if _CHILD not in site._modules:
        if hasattr(site, _CHILD):
            raise UnsupportedError(f"{type(site).__name__} has an attribute {_CHILD!r}, the name that a bound site needs for itself")
        site._modules[_CHILD] = nn.ModuleList()
    site._modules[_CHILD].append(leaves)


def _tensors(op: Op, module: Any) -> Params:
    return leaves_at(module, op.slot).tensors() if op.p is None else op.p


# ------------------------------------------------------------------------------------------------ the activation route
def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The frozen layer with the adapters' phases around it."""
    enter(self)
    try:
        return _call(self, args, kwargs)
    finally:
        leave(self)


def _call(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    ops = self._ll_ops
    if len(args) == 1 and not kwargs:
        return _phases(ops, len(ops), self._ll_frozen, self, args[0])
    name = None if args else next(iter(kwargs))
    rest = args[1:]

    def frozen(x: Tensor) -> Any:
        return self._ll_frozen(x, *rest, **kwargs) if name is None else self._ll_frozen(**{**kwargs, name: x})

    return _phases(ops, len(ops), frozen, self, args[0] if name is None else kwargs[name])


def _phases(ops: Sequence[Op], count: int, frozen: Callable[[Tensor], Any], module: Any, x: Tensor) -> Any:
    """The layer as its first `count` adapters leave it; a later one is outside an earlier one, as merging in order would have it."""
    if count == 0:
        return frozen(x)
    op = ops[count - 1]
    variant, cfg, site = op.variant, op.cfg, op.site
    p = _tensors(op, module)
    d = None if variant.prepare is None else variant.prepare(cfg, p, site, _Layer(ops, count - 1, module, p))
    y = _phases(ops, count - 1, frozen, module, x if variant.inputs is None else variant.inputs(cfg, p, d, x, site))
    if variant.outputs is None:
        return y
    if op.dropout and module.training:
        x = F.dropout(x, op.dropout)
    return variant.outputs(cfg, p, d, x, y, site)


class _Layer:
    """What `prepare` may see of the layer underneath an adapter: its bias, and its product without the bias."""

    __slots__ = ("count", "module", "ops", "p")

    def __init__(self, ops: Sequence[Op], count: int, module: Any, p: Params) -> None:
        self.ops, self.count, self.module, self.p = ops, count, module, p

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)  # a linear-like layer needn't have the attribute
        if self.count == 0 and (bias is None or not bias.is_meta):
            return bias
        zero = torch.zeros(1, self.ops[0].site.d_in, device=next(iter(self.p.values())).device)
        return self._call(zero)[0]

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        if self.count or not is_dense(self.module, weight) or weight.is_meta:
            raise UnsupportedError(
                f"{self.ops[0].site.path!r}: {self.ops[self.count].variant.name} multiplies the dense weight itself in every call, and "
                f"this layer ({type(self.module).__name__}) has {'other adapters inside' if self.count else 'none at hand'}; "
                "merge those first, or use a method that needs only the layer's call"
            )
        return weight

    def linear(self, x: Tensor) -> Tensor:
        weight = self.module.weight
        if self.count == 0 and type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta:
            return F.linear(x.to(weight.dtype), weight)
        y, bias = self._call(x), self.bias  # a quantised or offloaded layer, or one with other adapters inside: probe its call
        return y if bias is None else y - bias.to(y.dtype)

    def _call(self, x: Tensor) -> Tensor:
        return _phases(self.ops, self.count, self.module._ll_frozen, self.module, x.to(compute_dtype(self.module)))


# ---------------------------------------------------------------------------------------------------- the weight route
def _adapted(self: Any) -> tuple[Tensor, Tensor | None]:
    """(W', b') of a site whose weight is used without calling it."""
    return merge_site(self, self._ll_ops, self._parameters["weight"], self._parameters.get("bias"))


def _read(name: str) -> property:
    """What `site.weight` or `.bias` is: the layer's own inside its own call, else the adapted one, made when it is used."""

    def get(self: Any) -> Any:
        found = _own(self, name)
        if found is _NONE:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if inside(self):
            return found
        weight = _own(self, "weight")
        if not isinstance(weight, Tensor) or not is_dense(self, weight):
            return found  # packed: nothing that an adapter could go into
        if found is None or torch.compiler.is_compiling():
            return _merged(self, weight, name)
        return Adapted(f"{self._ll_ops[-1].site.path}.{name}", found, lambda: _merged(self, weight, name))

    def put(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, put)


_NONE = object()


def _own(self: Any, name: str) -> Any:
    """A layer's tensor as the layer sees it: stored, set on it by a hook, or computed by its class's own property."""
    attributes = self.__dict__
    if name in attributes["_parameters"]:
        return attributes["_parameters"][name]
    if name in attributes:
        return attributes[name]
    if name in attributes["_buffers"]:
        return attributes["_buffers"][name]
    inherited = getattr(self._ll_base, name, None)
    return inherited.__get__(self) if isinstance(inherited, property) else _NONE


def _merged(self: Any, weight: Tensor, name: str) -> Any:
    bias = _own(self, "bias")
    return merge_site(self, self._ll_ops, weight, None if bias is _NONE else bias)[name == "bias"]


def merge_site(module: Any, ops: Iterable[Op], W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The dense weight and bias with the adapters in, summed in float32 at least, returned in the weight's dtype.

    Raises:
        UnsupportedError: a method has no dense equivalent.
    """
    dtype = W.dtype
    core = torch.promote_types(dtype, torch.float32)
    W, b = W.to(core), None if b is None else b.to(core)
    for op in ops:
        if op.variant.weight is None:
            raise UnsupportedError(f"{op.site.path!r}: {op.variant.name} has no dense equivalent, so it can't be merged there")
        W, b = op.variant.weight(op.cfg, _tensors(op, module), op.site, W, b)
    return W.to(dtype), None if b is None else b.to(dtype)


# --------------------------------------------------------------------------------------------------------- site classes
@at_trace_time
def site_class(cls: type[nn.Module], by_weight: bool) -> type[nn.Module]:
    """The subclass that a site's copy is an instance of; made once per class."""
    key = (cls, by_weight)
    if key not in _CLASSES:
        body: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        body |= {"__reduce_ex__": _reduce_site, "_ll_base": cls}
        if by_weight:
            body["weight"] = property(lambda self: _adapted(self)[0])
            body["bias"] = property(lambda self: _adapted(self)[1])
        else:
            body["forward"] = _forward
            body["_ll_frozen"] = cls.forward
            body |= {name: _read(name) for name in ("weight", "bias") if isinstance(getattr(cls, name, None), (property, type(None)))}
        _CLASSES[key] = type(cls.__name__, (cls,), body)
    return _CLASSES[key]


_CLASSES: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}


def _reduce_site(self: Any, protocol: Any) -> tuple[Any, ...]:
    return _new_site, (self._ll_base, "forward" not in type(self).__dict__), self.__dict__


def _new_site(cls: type[nn.Module], by_weight: bool) -> nn.Module:
    made = site_class(cls, by_weight)
    return made.__new__(made)
