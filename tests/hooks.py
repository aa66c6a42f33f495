"""Modules with hooks."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def hooked(module: nn.Module) -> None:
    """As accelerate's add_hook_to_module does it: a partial on the instance around its old bound
    forward.
    """
    old = module.forward
    module._old_forward = old  # type: ignore[assignment]

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old)  # type: ignore[method-assign]
