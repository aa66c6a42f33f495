"""Contrastive pairs: what comes to each site at the last token of two texts that differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.errors import ConfigError, UnsupportedError
from ..core.site import Params, Site
from ..core.statistics import SiteStatistics, Statistics
from .batches import arguments

__all__ = ["PairRecorder"]


class PairRecorder:
    """Collects the pairs. Its `outputs` is a phase like any method's, and returns y as it came."""

    def __init__(self, found: list[tuple[Site, nn.Module]]) -> None:
        self.calls = {site.path: 0 for site, _ in found}
        self.seen: dict[str, list[Tensor]] = {}
        self.points: dict[str, Tensor] = {}
        self.mask: Tensor | None = None

    def step(self, copy: nn.Module, batch: Any, loss_fn: Any) -> None:
        """Run one batch of pairs, (positive, negative), through the model.

        Each side is what the model takes. Row k of one side is the counterpart of row k of the
        other.

        Raises:
            ConfigError: the batch is no pair, or its sides have different numbers of rows.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ConfigError(
                f"calibration data: expected pairs (positive, negative), found "
                f"{type(batch).__name__}"
            )
        sides = []
        for side in batch:
            args, kwargs = arguments(copy, side, False)
            mask = kwargs.get("attention_mask")
            self.mask = mask > 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None
            self.points = {}
            copy(*args, **kwargs)
            sides.append(self.points)
        for path, positive in sides[0].items():
            negative = sides[1].get(path)
            if negative is None or negative.shape != positive.shape:
                raise ConfigError(
                    f"site {path!r}: the positive batch has {len(positive)} rows, the negative "
                    f"one another number"
                )
            self.seen.setdefault(path, []).append(torch.stack([positive, negative]))

    def outputs(
        self, cfg: AdapterConfig, p: Params, d: None, x: Tensor, y: Tensor, site: Site
    ) -> Tensor:
        """Return y, and record the last token of x."""
        self.calls[site.path] += 1
        self.points[site.path] = self._last(x.detach(), site.path)
        return y

    def _last(self, x: Tensor, path: str) -> Tensor:
        """The last token that isn't padding, (n, d_in), of x (n, T, d_in).

        An x (n, d_in) is returned as it is.

        Raises:
            UnsupportedError: x has another number of dimensions.
        """
        if x.ndim not in (2, 3):
            raise UnsupportedError(
                f"site {path!r}: expected inputs (n, tokens, d_in) or (n, d_in), found shape "
                f"{tuple(x.shape)}"
            )
        if x.ndim == 3:
            tokens = x.shape[1]
            if self.mask is not None and self.mask.shape == x.shape[:2]:
                places = torch.arange(1, tokens + 1, device=self.mask.device)
                # The largest place that isn't masked is the last token that counts.
                where = (self.mask * places).argmax(1)
                x = x[torch.arange(len(x), device=x.device), where.to(x.device)]
            else:
                x = x[:, -1]
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def statistics(self, batches: int) -> Statistics:
        """The pairs as a value."""
        joined: Mapping[str, Tensor] = {
            path: torch.cat(found, 1) for path, found in self.seen.items()
        }
        return Statistics(
            {
                path: SiteStatistics(calls, batches, points=joined.get(path))
                for path, calls in self.calls.items()
            }
        )
