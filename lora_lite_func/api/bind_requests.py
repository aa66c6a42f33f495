"""bind_requests: a model for continuous batching, in which each request has its own adapter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

from ..algebra.bank import Bank
from ..core.adapter import Adapter
from ..core.errors import UnsupportedError
from ..injection.base_tensors import Frozen
from ..injection.tree_copy import copy_tree
from ..layers.refusals import check_model
from .bind import ModelT
from .request_server import RequestServer

__all__ = ["bind_requests"]


def bind_requests(
    model: ModelT, adapters: Adapter | Bank, *, flattened: str | Sequence[str] = ()
) -> ModelT:
    """A module of the model's own class for transformers' continuous batching, in which each
    request has its own adapter.

    `served.generate_batch(prompts, adapters=["fr", None, "de"])` takes an adapter for each prompt;
    a manager of `served.init_continuous_batching()` (or `continuous_batching_context_manager`)
    takes it with the request: `manager.add_request(prompt, adapter="fr")`,
    `manager.add_requests(prompts, adapters=[...])`. None is the bare base. The answers are those of
    `ll.bind(model, adapter).generate(prompt)`. All else is transformers' own.

    Of a Bank each step sees the members as they are then: new ones may come, and one whose requests
    are done may be dropped. The user's model isn't changed, and its weights are shared. Requests
    don't share blocks of the cache, and calls are neither compiled nor recorded.

    Args:
        model: a language model of transformers, the frozen base.
        adapters: what `ll.stack` gave, or an `ll.Bank`.
        flattened: as in `ll.rows`.

    Raises:
        StructureError: not a stack, or one that doesn't fit the model; in a call, an adapter that
            isn't there, or another number of adapters than prompts.
        UnsupportedError: the model has no continuous batching, or can't be copied; in a call,
            settings that record it, or a call outside of continuous batching.
    """
    check_model(model)
    if not callable(getattr(type(model), "init_continuous_batching", None)):
        raise UnsupportedError(
            f"bind_requests: {type(model).__name__} has no continuous batching; it takes a "
            f"language model of transformers that has init_continuous_batching"
        )
    served = cast(ModelT, copy_tree(model, {}, Frozen()))
    server = RequestServer(served, adapters, flattened)

    @functools.wraps(server.base.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return server.forward(*args, **kwargs)

    served.__dict__["forward"] = forward
    served.__dict__["generate_batch"] = server.generate_batch
    served.__dict__["init_continuous_batching"] = server.init_continuous_batching
    return served
