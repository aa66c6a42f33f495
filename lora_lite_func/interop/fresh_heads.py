"""Heads that a checkpoint lacked, so that transformers drew them at random.

Few adapters are meant to leave such a head as it is.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..core.site import Site
from ..layers.kinds import module_and_name
from ..layers.tied import embeddings_of

__all__ = ["warn_of_fresh_heads"]

_TOLD: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The models whose head was warned of, or is trained."""


def warn_of_fresh_heads(model: Any, sites: Iterable[Site]) -> None:
    """Warn, once a model, where a new head would stay frozen.

    Args:
        model: the base.
        sites: the sites of its new adapter.
    """
    if not isinstance(getattr(model, "base_model_prefix", None), str) or model in _TOLD:
        return
    heads = _fresh_heads(model)
    if not heads:
        return
    _TOLD.add(model)
    adapted = {module_and_name(site)[0] for site in sites}
    left = [head for head in heads if head not in adapted]
    if left:
        patterns = tuple(f"^{re.escape(head)}\\." for head in left)
        warnings.warn(
            f"the checkpoint that the model was loaded from lacked {', '.join(map(repr, left))}: "
            f"the weights there are random, and this adapter leaves them frozen. To train them "
            f"beside: ll.init(model, ll.FullConfig(target_parameters={patterns})), and give both "
            f"adapters to ll.apply or ll.bind as a tuple",
            stacklevel=3,
        )


def _fresh_heads(model: Any) -> list[str]:
    """The paths of modules outside the base model whose parameters are as transformers drew them.

    transformers marks the parameters that it loads. One that was drawn and is as it was has been
    written on once. A table that was resized is drawn, too.
    """
    loaded = [_is_loaded(p) for p in model.parameters()]
    if not any(loaded) or all(loaded):
        return []
    tables = [embeddings_of(model, "input"), embeddings_of(model, "output")]
    inner = model.base_model_prefix
    return [
        path
        for path, module in model.named_modules()
        if path.partition(".")[0] != inner
        and not any(module is table for table in tables)
        and any(_is_fresh(p) for p in module._parameters.values() if p is not None)
    ]


def _is_loaded(parameter: Any) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))


def _is_fresh(parameter: Any) -> bool:
    return not _is_loaded(parameter) and not parameter.is_meta and parameter._version <= 1
