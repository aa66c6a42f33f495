"""What a site's copy is: an instance of a subclass of the layer's own class, so it keeps isinstance, hooks, flags and attributes.

Its call goes by the activation route (phases.py, plain.py) or by the weight route (substitution.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.torch_internals import at_trace_time
from ..layers.embedding import bounded, padded, rows
from .activation_route import phases
from .linear import linear
from .prepared import kept, moved, replicated, stamped
from .state import Held
from .weight_route import flatten_again, read, read_substituted, substituted
from .weight_view import enter, leave

__all__ = ["site_class"]


# ----------------------------------------------------------------------------- the activation route
def _linear(self: Any, input: Tensor) -> Any:
    """nn.Linear's own call with the adapters in."""
    attachment = self._ll_only
    if attachment is not None and not torch.compiler.is_compiling():
        made = linear(self, attachment, input)
        if made is not None:
            return made
    return _forward(self, input)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The frozen layer with the adapters' phases around it.

    The layer's own class works on a plain twin, an object with the very attributes of the site: so
    it reads its stored tensors.
    """
    attributes = self.__dict__
    own = (
        "_ll_frozen" in attributes or "forward" in attributes or "_ll_slots" in attributes
    )  # e.g. accelerate's wrapper around this call
    if self._ll_twin and not own and not torch.compiler.is_compiling():
        twin = object.__new__(self._ll_base)
        object.__setattr__(twin, "__dict__", attributes)
        return _call(self, twin, twin.forward, args, kwargs)
    enter(self)
    try:
        return _call(self, self, self._ll_frozen, args, kwargs)
    finally:
        leave(self)


def _call(
    self: Any, module: Any, layer: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    attachments = self._ll_attachments
    if len(args) == 1 and not kwargs:
        return phases(attachments, len(attachments), layer, module, args[0])
    if not args and not kwargs:
        return layer()  # to say itself what is missing
    name = None if args else _input_name(self._ll_base, tuple(kwargs))
    rest = args[1:]

    def frozen(x: Tensor) -> Any:
        return layer(x, *rest, **kwargs) if name is None else layer(**{**kwargs, name: x})

    return phases(
        attachments, len(attachments), frozen, module, args[0] if name is None else kwargs[name]
    )


@at_trace_time
def _input_name(cls: type[nn.Module], given: tuple[str, ...]) -> str:
    """Which of the keywords of a layer's call is its input: the first that its forward lists."""
    return next(
        (name for name in inspect.signature(cls.forward).parameters if name in given), given[0]
    )


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
            y = phases(self._ll_attachments, len(self._ll_attachments), frozen, self, input)
        finally:
            leave(self)
        y = padded(self, input, y, seen[-1])
        return y if self.max_norm is None else bounded(y, self)


# ------------------------------------------------------------------------------------- site classes
@at_trace_time
def site_class(
    cls: type[nn.Module], active: bool, names: tuple[str, ...] | None
) -> type[nn.Module]:
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
        computed = tuple(
            name for name in ("weight", "bias") if isinstance(getattr(cls, name, None), property)
        )
        body["_ll_computed"] = computed
        plain = names is None and cls.forward is nn.Linear.forward and not computed
        body |= {name: read_substituted(name) for name in names or ()}
        bases: tuple[type, ...] = (cls,)
        if active and issubclass(cls, nn.Embedding):
            bases = (_Lookup,) if cls is nn.Embedding else (cls, _Lookup)
            body["_ll_frozen"] = nn.Embedding.forward
        elif active:
            body |= {"forward": _linear if plain else _forward, "_ll_twin": names is None}
            body["_ll_frozen"] = cls.forward if names is None else substituted
        else:
            body["forward"] = cls.forward if names is None else substituted
        if issubclass(
            cls, nn.RNNBase
        ):  # after a .to(): nothing here is to be flattened, the call's own copy is
            body |= {"_init_flat_weights": flatten_again, "flatten_parameters": lambda self: None}
        if getattr(cls, "__iter__", None) in (nn.Sequential.__iter__, nn.ModuleList.__iter__):
            body |= {
                "__iter__": lambda self: iter(_links(self)),
                "__len__": lambda self: len(_links(self)),
                "_ll_twin": False,
            }
        if active:
            body |= {
                "_apply": moved,
                "_load_from_state_dict": _loaded,
                "_replicate_for_data_parallel": replicated,
                "__setstate__": _restored,
            }
            own = (
                name
                for name in (("weight",) if _Lookup in bases else ("weight", "bias"))
                if name not in body
            )
            body |= {
                name: read(name)
                for name in own
                if isinstance(getattr(cls, name, None), (property, type(None)))
            }
        _CLASSES[key] = type(cls.__name__, bases, body)
    return _CLASSES[key]


_CLASSES: dict[tuple[type[nn.Module], bool, tuple[str, ...] | None], type[nn.Module]] = {}


def _reduce_site(self: Any, protocol: Any) -> tuple[Any, ...]:
    state = {
        name: value for name, value in self.__dict__.items() if name != "_flat_weight_refs"
    }  # made again by a recurrent layer
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
