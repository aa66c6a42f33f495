"""Recorder: an adapter whose phases change nothing and sum what the layers see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.errors import ConfigError, UnsupportedError
from ..core.site import Params, Site
from ..core.statistics import Moments, SiteStatistics, Statistics
from ..injection.base_tensors import constant, own_bias, own_buffers, own_memory
from ..layers.targeting import Found
from ..layers.weights import compute_dtype, device_of
from .batches import arguments, described

__all__ = ["EvalTensors", "Recorder", "refuse_weight"]


class Recorder:
    """The sums as they grow. Its `outputs` is a phase like any method's, and returns y itself."""

    def __init__(
        self, found: Found, needs: frozenset[str], directions: Mapping[str, Tensor]
    ) -> None:
        self.calls = {site.path: 0 for site, _ in found}
        self.moments: dict[str, Moments] = {}
        self.slopes: dict[str, Tensor] = {}
        self.directions = directions
        self.active: dict[str, Tensor] = {}
        self.gradients = "gradients" in needs
        self.mask: Tensor | None = None
        self.last: tuple[Tensor, int, dict[int, tuple[Moments, Moments]]] | None = None
        # Backward runs to this tensor, so that no .grad is written anywhere.
        self.probe = torch.zeros((), device="cpu", requires_grad=True)
        if "inputs" in needs:
            start: dict[tuple[int, torch.dtype, torch.device], Moments] = {}
            for site, module in found:
                key = (
                    site.d_in,
                    torch.promote_types(compute_dtype(module), torch.float32),
                    device_of(module),
                )
                if key not in start:
                    start[key] = Moments.none(*key)
                self.moments[site.path] = start[key]

    def step(self, copy: nn.Module, batch: Any, loss_fn: Any) -> None:
        """Run one batch through the model, and back if gradients are wanted.

        Raises:
            ConfigError: the model can't take the batch, or the loss is no scalar that depends on
                the chosen layers.
        """
        args, kwargs = arguments(copy, batch, loss_fn is not None)
        mask = kwargs.get("attention_mask")
        self.mask = mask > 0 if isinstance(mask, Tensor) and mask.ndim <= 2 else None
        try:
            output = copy(*args, **kwargs)
            if self.gradients:
                loss = loss_fn(output, batch)
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    raise ConfigError(f"loss_fn: expected a scalar tensor, found {described(loss)}")
                if not loss.requires_grad:
                    raise ConfigError(
                        "loss_fn: its result depends on none of the chosen layers (is it detached?)"
                    )
                torch.autograd.grad(loss.reshape(()), self.probe, allow_unused=True)
        finally:
            self.last = None

    def outputs(
        self, cfg: AdapterConfig, p: Params, d: None, x: Tensor, y: Tensor, site: Site
    ) -> Tensor:
        """Return y, and record what is seen."""
        self.calls[site.path] += 1
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if self.moments:
                self._see(site.path, x)
            if site.path in self.directions:
                self._see_directions(site.path, x.detach())
        if not self.gradients:
            return y
        y = y + self.probe
        # Under a no_grad of the model's own y doesn't require gradients.
        if y.requires_grad:
            y.register_hook(self._listener(site, x.detach()))
        return y

    def _see(self, path: str, x: Tensor) -> None:
        old = self.moments[path]
        version = -1 if x.is_inference() else x._version
        if self.last is None or self.last[0] is not x or self.last[1] != version or version < 0:
            self.last = (x, version, {})
        # `known` holds what this very input made of which sums, because layers that have had the
        # same inputs share a sum.
        known = self.last[2]
        if id(old) not in known:
            known[id(old)] = (old, old.seeing(self._unmasked(x.detach())))
        self.moments[path] = known[id(old)][1]

    def _see_directions(self, path: str, x: Tensor) -> None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        V = self.directions[path].to(x.device, dtype)  # (k, d_in)
        seen = (self._unmasked(x).to(dtype) @ V.mT).abs().sum(0)
        self.active[path] = self.active[path] + seen if path in self.active else seen

    def _unmasked(self, x: Tensor) -> Tensor:
        """The rows of x (..., d_in) that count."""
        rows = x.reshape(-1, x.shape[-1])
        mask = self.mask
        if mask is None or (x.shape[:-1] != mask.shape and (x.ndim != 2 or len(x) != mask.numel())):
            return rows
        return rows[mask.reshape(-1).to(rows.device)]

    def _listener(self, site: Site, x: Tensor) -> Any:
        version = x._version

        def listen(g: Tensor) -> None:
            if x._version != version:
                raise UnsupportedError(
                    f"site {site.path!r}: the model changes its input in place afterwards, so "
                    f"its gradient is lost"
                )
            dtype = torch.promote_types(g.dtype, torch.float32)
            with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
                rows = x.reshape(-1, site.d_in).to(g.device, dtype)
                slope = g.reshape(-1, site.d_out).to(dtype).mT @ rows  # (d_out, d_in)
                before = self.slopes.get(site.path)
                self.slopes[site.path] = slope if before is None else before + slope

        return listen

    def statistics(self, batches: int) -> Statistics:
        """The sums as a value."""
        return Statistics(
            {
                path: SiteStatistics(
                    calls,
                    batches,
                    self.moments.get(path),
                    self.slopes.get(path),
                    active=self.active.get(path),
                )
                for path, calls in self.calls.items()
            }
        )


def refuse_weight(
    cfg: AdapterConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The `weight` of a recorder: what takes a weight without the call can't be recorded.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        f"site {site.path!r}: its weight is used without calling the layer, so calibration can't "
        f"see what comes to it; leave it out (exclude_names), or use a method that needs no data"
    )


class EvalTensors:
    """What a copy in eval mode holds: parameters as constants, and buffers, other tensors and
    arrays of its own.
    """

    kept = False

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}

    def __call__(self, copy: nn.Module, path: str) -> None:
        weight = copy._parameters.get("weight")
        # bitsandbytes repacks a 4-bit weight in place when it first runs in eval mode.
        if weight is None or weight.is_floating_point():
            copy.__dict__["training"] = False
        own_buffers(copy, self.made)
        own_bias(copy)
        for name, p in copy._parameters.items():
            if p is not None and p.requires_grad:
                copy._parameters[name] = constant(p, copy)  # type: ignore[assignment]

    def tensor_for(self, memory: Any, holder: nn.Module) -> Any:
        return own_memory(memory, self.made)
