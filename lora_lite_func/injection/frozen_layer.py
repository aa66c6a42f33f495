"""What a method may see of the layer underneath it.

That is the frozen layer, or the frozen layer with other adapters in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.site import Params
from ..core.torch_internals import first_of, is_sharded, is_wrapper
from ..layers.kinds import KINDS, matrix
from ..layers.quantised import dequantised
from ..layers.sharded import replicated, whole
from ..layers.weights import compute_dtype, is_dense, is_packed
from .attachment import Attachment
from .dense_weight import merge_site

__all__ = ["FrozenLayer"]


class FrozenLayer:
    """What `prepare` may see of the layer underneath an adapter: an `ll.Layer`."""

    __slots__ = ("attachments", "count", "module", "p", "phases")

    def __init__(
        self,
        attachments: Sequence[Attachment],
        count: int,
        module: Any,
        p: Params,
        phases: Callable[..., Any],
    ) -> None:
        if any(attachment.called for attachment in attachments[:count]):
            # Hooks are to see the model's call, and not what a method asks of the layer.
            attachments = [attachment.changed(called=False) for attachment in attachments]
        self.attachments, self.count, self.module = attachments, count, module
        self.p, self.phases = p, phases

    @property
    def inside(self) -> Sequence[Attachment]:
        """The adapters between this one and the frozen layer, innermost first."""
        return self.attachments[: self.count]

    @property
    def is_plain(self) -> bool:
        """Whether the layer has a dense weight at hand and no other adapters inside."""
        weight: Any = getattr(self.module, "weight", None)
        # Subclasses count: of a user's parameter, or what an export traces with.
        dense = (
            isinstance(weight, Tensor)
            and weight.is_floating_point()
            and not weight.is_meta
            and not is_wrapper(weight)
        )
        return dense and self.count == 0

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias with the adapters inside; None where it has none."""
        # A linear-like layer needn't have the attribute.
        bias = getattr(self.module, "bias", None)
        if self.count == 0 and (bias is None or not bias.is_meta):
            return None if bias is None else whole(bias)
        if KINDS[self.attachments[0].site.kind].one_hot:
            return None
        device = next(iter(self.p.values())).device
        zero = torch.zeros(1, self.attachments[0].site.d_in, device=device)
        return self._call(zero)[0]

    @property
    def is_changed(self) -> bool:
        """Whether adapters are inside, or the layer has another weight than the base's own."""
        return self.count > 0 or bool(self.module._ll.rebased)

    def current_weight(self) -> Tensor:
        """The dense weight (d_out, d_in) with the adapters inside.

        Where there is no dense weight at hand, it is what the layer makes of the unit vectors.

        Raises:
            UnsupportedError: an adapter inside makes more of the layer than a product.
        """
        self._check_product()
        weight, site = getattr(self.module, "weight", None), self.attachments[0].site
        inside = self.inside
        mergeable = all(a.variant.weight is not None and a.row_plan is None for a in inside)
        if isinstance(weight, Tensor) and is_dense(weight, site.d_in * site.d_out) and mergeable:
            whole = merge_site(self.module, inside, weight, None)[0] if inside else weight
            return matrix(whole, site)
        first = next(iter(self.p.values()))
        unit = torch.eye(site.d_in, dtype=compute_dtype(self.module), device=first.device)
        return self.linear(unit).mT

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode."""
        return bool(self.module.training)

    @property
    def weight(self) -> Tensor:
        """The dense weight (d_out, d_in) of the layer, dequantised where it is packed.

        Raises:
            UnsupportedError: there is none at hand, or other adapters are inside.
        """
        weight: Tensor = self.module.weight
        site = self.attachments[0].site
        if self.count == 0 and is_packed(weight) and not (weight.is_meta or is_sharded(weight)):
            return dequantised(self.module, weight)
        if (
            self.count
            or not is_dense(weight, site.d_in * site.d_out)
            or (weight.is_meta and not next(iter(self.p.values())).is_meta)
        ):
            raise UnsupportedError(
                f"{site.path!r}: {self.attachments[self.count].variant.name} multiplies the dense "
                f"weight itself in every call, and this layer ({type(self.module).__name__}) has "
                f"{'other adapters inside' if self.count else 'none at hand'}; merge those first, "
                f"or use a method that needs only the layer's call"
            )
        return matrix(weight, site)

    def linear(self, x: Tensor) -> Tensor:
        """The layer's product x W^T without its bias.

        Raises:
            UnsupportedError: an adapter inside makes more of the layer than a product.
        """
        self._check_product()
        weight = self.module.weight
        if self.is_plain:
            return F.linear(x.to(weight.dtype), matrix(weight, self.attachments[0].site))
        if KINDS[self.attachments[0].site.kind].one_hot:
            table = weight
            if self.count:
                table = merge_site(self.module, self.inside, weight, None)[0]
            return F.linear(x, matrix(table, self.attachments[0].site).to(x.dtype))
        # The layer is quantised or offloaded, or has other adapters inside, so it is called.
        y, bias = self._call(x), self.bias
        return y if bias is None else y - bias.to(y.dtype)

    def _check_product(self) -> None:
        """Refuse to read a weight that an adapter inside hasn't left."""
        for inside in self.inside:
            if inside.variant.weight is None:
                raise UnsupportedError(
                    f"{inside.site.path!r}: {self.attachments[self.count].variant.name} reads the "
                    f"layer underneath as a product with a weight, and {inside.variant.name} there "
                    f"has no dense equivalent; put it first, so that {inside.variant.name} is "
                    f"outside"
                )

    def _call(self, x: Tensor) -> Tensor:
        by_rows = (inside for inside in self.inside if inside.row_plan is not None)
        mixed = first_of(by_rows, None)
        if mixed is not None:
            raise UnsupportedError(
                f"{mixed.site.path!r}: {self.attachments[self.count].variant.name} reads the "
                f"layer underneath, which here is another one for each row ({mixed.variant.name} "
                f"by rows); put it first, so that the rows' own adapters are outside"
            )
        module = self.module
        x = x.to(compute_dtype(module))
        if is_sharded(module.weight):
            x = replicated(x, module.weight.device_mesh)
        y: Tensor = self.phases(self.attachments, self.count, module.forward, module, x)
        return whole(y)
