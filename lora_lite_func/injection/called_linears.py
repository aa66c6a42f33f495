"""Factors of a bound model as linear layers that are called.

This is for tools that hook modules: per-sample gradients of opacus, Kronecker factors of
curvlinops, laplace and nngeometry, the engine of torchjd.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ..core.errors import UnsupportedError
from ..core.layout import Layout, LeafSpec
from ..core.site import Params, Site
from ..kernels.low_rank import cast
from ..layers.weights import read_tensor
from .attachment import Attachment
from .state import Leaves

__all__ = ["CalledLeaves", "called_outputs", "check_callable", "uncalled"]

_FACTORS = ("lora_A", "lora_B")
_INSTEAD = "bind it without linears=True, or leave that layer out with exclude_names"


def check_callable(layout: Layout, by_rows: bool) -> None:
    """Refuse an adapter whose factors can't be linear layers that are called.

    Raises:
        UnsupportedError: the method isn't a branch B(A(x)), a site is no linear layer, or each row
            of a batch has an adapter of its own.
    """
    variant = layout.variant
    where = f"ll.bind(..., linears=True): site {next(iter(layout.sites))!r}"
    if variant.called_outputs is None:
        raise UnsupportedError(
            f"{where}: {variant.name} has no factors A and B that act on their own, as B(A(x)); "
            f"bind it without linears=True, or take a low-rank method (LoRA, PiSSA, DoRA ...)"
        )
    if by_rows:
        raise UnsupportedError(
            f"{where}: each row of a batch has an adapter of its own, and a linear layer has one "
            f"weight; bind a member (ll.unstack), or the rows without linears=True"
        )
    if variant.check_calls is not None:
        try:
            variant.check_calls(layout.config)
        except UnsupportedError as error:
            raise UnsupportedError(f"{where}: {error}, or bind it without linears=True") from None
    for path, site in layout.sites.items():
        if not layout.shared.get(path, {}).keys().isdisjoint(_FACTORS):
            raise UnsupportedError(
                f"ll.bind(..., linears=True): site {path!r}: {variant.name} has one factor for "
                f"several layers, and a tool would count its calls as one layer's; {_INSTEAD}"
            )
        if site.kind != "linear":
            raise UnsupportedError(
                f"ll.bind(..., linears=True): site {path!r}: expected a linear layer, found "
                f"kind {site.kind!r}; {_INSTEAD}"
            )


def uncalled(path: str) -> UnsupportedError:
    """The error for a layer whose weight is used without a call."""
    return UnsupportedError(
        f"ll.bind(..., linears=True): site {path!r}: the model uses its weight without calling the "
        f"layer, so nothing would be called; {_INSTEAD}"
    )


class CalledLeaves(Leaves):
    """The tensors of one adapter at one site of a bound model, lora_A and lora_B as nn.Linear.

    Their parameters are `lora_A.weight` and `lora_B.weight`. The state of a model that was bound
    without linears is taken too.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        specs: Mapping[str, LeafSpec],
        shared: Mapping[str, nn.Parameter] = MappingProxyType({}),
    ) -> None:
        super().__init__({n: t for n, t in tensors.items() if n not in _FACTORS}, specs, shared)
        self.names = tuple(tensors)
        for name in _FACTORS:
            setattr(self, name, _linear(tensors[name], specs[name].trainable))

    def forward(self) -> dict[str, Tensor]:
        """{lora_name: tensor}: the tensors as they are now, read from files where offloaded."""
        found = {name: getattr(self, name) for name in self.names}
        return found | {name: _weight(found[name]) for name in _FACTORS}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in _FACTORS:
            if prefix + name in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _linear(weight: Tensor, trainable: bool) -> nn.Linear:
    """A linear layer on the tensor's storage; a frozen weight is a buffer."""
    d_out, d_in = weight.shape
    made = nn.Linear(d_in, d_out, bias=False, device="meta", dtype=weight.dtype)
    del made.weight
    if trainable:
        made.weight = nn.Parameter(weight.detach())
    else:
        made.register_buffer("weight", weight.detach())
    return made


def _weight(linear: nn.Linear) -> Tensor:
    weight = linear.weight
    return read_tensor(linear) if weight.is_meta and "_hf_hook" in linear.__dict__ else weight


def called_outputs(
    attachment: Attachment, leaves: Any, p: Params, d: Any, x: Tensor, y: Tensor, site: Site
) -> Tensor:
    """The method's phase after the layer, by calls of the linear layers that the site holds."""
    phase = attachment.variant.called_outputs
    assert phase is not None
    A, B = leaves.lora_A, leaves.lora_B
    return phase(attachment.cfg, p, d, cast(x, p["lora_A"].dtype), y, site, A, B)
