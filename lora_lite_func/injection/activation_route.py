"""The activation route: a site's own call, with the phases of its adapters around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import StructureError, UnsupportedError
from ..core.site import Site
from ..core.torch_internals import at_trace_time, is_sharded, is_traced
from ..layers.kinds import KINDS
from .attachment import Attachment
from .jagged_inputs import by_values
from .phases import phases
from .sharded_call import sharded_call
from .stand_in import on_stand_in

__all__ = ["forward", "on_input"]


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A site's call: the frozen layer with the adapters' phases around it."""
    attachments = self._ll.attachments
    return on_stand_in(
        self,
        self._ll_base,
        lambda layer, call: _around(attachments, layer, call, args, kwargs),
    )


def on_input(self: Any, x: Any) -> Any:
    """`forward` of a layer that takes only its input."""
    attachments = self._ll.attachments
    return on_stand_in(
        self, self._ll_base, lambda layer, call: _on_input(attachments, call, layer, x)
    )


def _around(
    attachments: Sequence[Attachment],
    module: Any,
    layer: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The phases around a call whose first argument is the layer's input."""
    if len(args) == 1 and not kwargs:
        return _on_input(attachments, layer, module, args[0])
    if not args and not kwargs:
        # The layer itself says what is missing.
        return layer()
    if args:
        rest = args[1:]
        return _on_input(attachments, lambda x: layer(x, *rest, **kwargs), module, args[0])
    name = _input_name(getattr(type(module), "_ll_base", type(module)), tuple(kwargs))
    return _on_input(attachments, lambda x: layer(**{**kwargs, name: x}), module, kwargs[name])


def _on_input(
    attachments: Sequence[Attachment], frozen: Callable[[Any], Any], module: Any, x: Any
) -> Any:
    """Run all phases, for an input that the layer itself would take.

    Where no phase comes before the layer, a plain tensor isn't checked, because the layer itself
    says what is wrong with it.
    """
    plain = type(x) is Tensor and not x.is_nested and x.layout is torch.strided
    if plain and len(attachments) == 1:
        before = attachments[0].variant.inputs is not None
        if not before or (attachments[0].site.kind == "linear" and _fits(x, attachments[0].site)):
            return phases(attachments, 1, frozen, module, x)
    return _on_checked(attachments, frozen, module, x)


def _on_checked(
    attachments: Sequence[Attachment], frozen: Callable[[Any], Any], module: Any, x: Any
) -> Any:
    """Run all phases, after a check of the input.

    Raises:
        StructureError: the input's last dimension isn't the layer's, and the layer doesn't say so.
        UnsupportedError: the input is sparse or nested in a way that the phases can't take.
    """

    def call(x: Any) -> Any:
        return phases(attachments, len(attachments), frozen, module, x)

    if is_sharded(x):
        return sharded_call(
            attachments, module, x, lambda a, x: phases(a, len(a), frozen, module, x)
        )

    site = attachments[-1].site
    if KINDS[site.kind].listed:
        # The phase of a whole module acts on what the module gives.
        return call(x)
    if not isinstance(x, Tensor):
        # The layer raises its own error.
        frozen(x)
        return call(x)
    if x.is_nested:
        return by_values(x, attachments, call)
    if site.kind == "linear" and not _fits(x, site):
        # The layer raises its own error first; a phase might broadcast such an input.
        frozen(x)
        raise StructureError(
            f"site {site.path!r}: expected real numbers (..., {site.d_in}), found "
            f"{tuple(x.shape)}, {x.dtype}"
        )
    if x.layout is torch.strided:
        return call(x)
    try:
        return call(x)
    except (RuntimeError, NotImplementedError) as error:
        frozen(x)
        raise UnsupportedError(
            f"site {site.path!r}: {attachments[-1].variant.name} can't take an input of layout "
            f"{x.layout}; give a dense one (x.to_dense())"
        ) from error


def _fits(x: Tensor, site: Site) -> bool:
    """Whether x is (..., d_in), of real numbers.

    Under torch.jit.trace it is always true, because there are no numbers to compare.
    """
    if is_traced():
        return True
    return x.ndim > 0 and x.shape[-1] == site.d_in and not x.dtype.is_complex


@at_trace_time
def _input_name(cls: type[nn.Module], given: tuple[str, ...]) -> str:
    """Which of the keywords of a layer's call is its input: the first that its forward lists."""
    listed = inspect.signature(cls.forward).parameters
    return next((name for name in listed if name in given), given[0])
