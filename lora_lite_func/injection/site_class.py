"""The class of a site's copy: a subclass of the layer's own class.

So the copy keeps isinstance, hooks, flags and attributes. Its call goes by the activation route
(activation_route.py, linear.py) or by the weight route (weight_route.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..core.torch_internals import at_trace_time, flatten_again
from ..layers.embedding import bounded, padded, rows
from . import activation_route, linear, virtual_call
from .jagged_inputs import by_values
from .phases import phases
from .references import slots
from .stand_in import delegated, on_stand_in
from .state import Held
from .weight_properties import read, read_substituted
from .weight_route import substituted

__all__ = ["site_class"]


class _Lookup(nn.Embedding):
    """What a site's copy inherits between an embedding's own class and nn.Embedding."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """The frozen look-up with the adapters' phases around it; x holds the ids."""
        if input.is_nested:
            return by_values(input, self._ll.attachments, lambda ids: _Lookup.forward(self, ids))
        seen: list[Tensor] = []
        attachments = self._ll.attachments

        def on_table(table: Any, call: Callable[..., Tensor]) -> Tensor:
            def frozen(ids: Tensor) -> Tensor:
                seen.append(rows(table, ids) if table.max_norm is not None else call(ids))
                return seen[-1]

            return phases(attachments, len(attachments), frozen, table, input)

        y = padded(self, input, on_stand_in(self, nn.Embedding, on_table), seen[-1])
        return y if self.max_norm is None else bounded(y, self)


@at_trace_time
def site_class(
    cls: type[nn.Module],
    active: bool,
    names: tuple[str, ...] | None,
    called: bool = False,
    whole_call: bool = False,
) -> type[nn.Module]:
    """The subclass that a site's copy is an instance of; it is made once per class of layers.

    Args:
        cls: the layer's own class.
        active: whether phases go around its call.
        names: the tensors that are substituted; None if the call isn't touched for that.
        called: whether it holds linear layers that are called. Then the site is no instance of the
            layer's class, as tools would take it for a leaf that has all parameters inside.
        whole_call: whether arguments and result of its call are adapted.
    """
    # The layer's class keeps the subclasses. A table in this file would keep the class alive, and
    # the class of a parametrized layer is one of its own that holds the layer.
    made: dict[Any, type[nn.Module]] | None = cls.__dict__.get(_KEPT)
    if made is None:
        made = {}
        type.__setattr__(cls, _KEPT, made)
    key = (active, names, called, whole_call)
    if key not in made:
        made[key] = _made(cls, *key)
    return made[key]


_KEPT = "_ll_site_classes"


def _made(
    cls: type[nn.Module],
    active: bool,
    names: tuple[str, ...] | None,
    called: bool,
    whole_call: bool,
) -> type[nn.Module]:
    """Make a site's class.

    The class has these attributes of its own:

    _ll_base: the layer's own class.
    _ll_key: what `site_class` was called with, by which instances are pickled.
    _ll_computed: which of weight and bias the layer's class computes by a property.
    _ll_layer_call: what the phases go around.
    _ll_substitutes: whether tensors are substituted in the call.
    _ll_is_list: whether the layer is a list of layers.
    _ll_shares_dict: whether a plain object with the site's very attributes can stand for the layer.
    """
    computed = tuple(n for n in ("weight", "bias") if isinstance(getattr(cls, n, None), property))
    links = getattr(cls, "__iter__", None) in (nn.Sequential.__iter__, nn.ModuleList.__iter__)
    substitutes = names is not None
    layer_call = substituted if substitutes else cls.forward
    body: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__reduce_ex__": _reduce_site,
        "_ll_base": cls,
        "_ll_key": (cls, active, names, called, whole_call),
        "_ll_computed": computed,
        "_ll_layer_call": layer_call,
        "_ll_substitutes": substitutes,
        "_ll_is_list": links,
        "_ll_shares_dict": not substitutes and not slots(cls),
    }
    bases: tuple[type, ...] = (cls,)
    if called:
        bases, body = (nn.Module,), {**delegated(cls), **body}
    if whole_call:
        body |= virtual_call.methods(cls)
    elif active and issubclass(cls, nn.Embedding):
        bases = (_Lookup,) if cls is nn.Embedding else (cls, _Lookup)
        body["_ll_layer_call"] = nn.Embedding.forward
    elif active:
        plain = cls.forward is nn.Linear.forward and not (substitutes or computed or called)
        body["forward"] = linear.forward if plain else activation_route.forward
    else:
        body["forward"] = layer_call
    if not links:
        # A layer is printed from its stored tensors, so that printing merges nothing.
        body["extra_repr"] = lambda self: on_stand_in(self, cls, _extra_repr)
    if issubclass(cls, nn.RNNBase):
        # After a .to() nothing is flattened here; the copy that each call makes is flattened.
        body |= {"_init_flat_weights": flatten_again, "flatten_parameters": lambda self: None}
    if links:
        body |= {
            "__iter__": lambda self: iter(_links(self)),
            "__len__": lambda self: len(_links(self)),
        }
    body |= {name: read_substituted(name) for name in names or ()}
    if active and not links and not whole_call:
        readable = ("weight",) if _Lookup in bases else ("weight", "bias")
        body |= {
            name: read(name)
            for name in readable
            if name not in body and isinstance(getattr(cls, name, None), (property, type(None)))
        }
    return type(cls.__name__, bases, body)


def _extra_repr(layer: nn.Module, call: Callable[..., Any]) -> str:
    return layer.extra_repr()


def _reduce_site(self: Any, protocol: Any) -> tuple[Any, ...]:
    # A recurrent layer makes its weak references again.
    state = {name: value for name, value in self.__dict__.items() if name != "_flat_weight_refs"}
    return _new_site, self._ll_key, state


def _new_site(cls: type[nn.Module], *key: Any) -> nn.Module:
    made = site_class(cls, *key)
    return made.__new__(made)


def _links(self: Any) -> list[Any]:
    """The layers of a list of layers: all its children but its adapters."""
    return [child for child in self._modules.values() if type(child) is not Held]
