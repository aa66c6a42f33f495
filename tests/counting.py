"""Operations and bytes, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Counted(TorchDispatchMode):
    """Operations that reach the dispatcher, views apart, and how many numbers they write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            self.written += out.numel() if isinstance(out, torch.Tensor) else 0
        return out


def counted(call: Callable[[], Any]) -> Counted:
    with torch.no_grad(), Counted() as mode:
        call()
    return mode
