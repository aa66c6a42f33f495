"""What the phases of a call give besides the model's output, by site."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import UnsupportedError

__all__ = ["SideOutputs"]


class SideOutputs:
    """The values that sites give in one call. What comes later, when gradient checkpointing runs a
    part of the call again, isn't taken.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.graph = torch.is_grad_enabled()
        self.open = True

    def add(self, path: str, value: Tensor) -> None:
        """Take a site's value.

        Raises:
            UnsupportedError: the site has one already, or no graph leads to this one.
        """
        if not self.open:
            return
        if path in self.values:
            raise UnsupportedError(
                f"site {path!r}: it is called twice in one call, or has two routed adapters, so "
                f"which router's values to give isn't said; leave it out with exclude_names, or "
                f"take ll.apply"
            )
        if self.graph and not torch.is_grad_enabled():
            raise UnsupportedError(
                f"site {path!r}: it is called without a graph (torch.no_grad, or gradient "
                f"checkpointing with use_reentrant=True), so a loss of its router would have no "
                f"gradient; checkpoint with use_reentrant=False, or collect under torch.no_grad()"
            )
        self.values[path] = value

    def taken(self) -> dict[str, Tensor]:
        """{path: value}, paths in order; nothing is added from now on."""
        self.open = False
        return {path: self.values[path] for path in sorted(self.values)}
