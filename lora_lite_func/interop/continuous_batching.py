"""What transformers' continuous batching says of its requests, and what it must leave when each of
them has an adapter of its own.

Its manager packs the tokens of several requests into one row for each step. The model's call is
told how long the parts are, not whose they are; the manager's own record of the step says that.
"""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

from ..core.errors import LoraLiteError, UnsupportedError

__all__ = ["Requests", "refuse_rows", "settings_of"]


def refuse_rows(*args: Any, **kwargs: Any) -> Any:
    """`init_continuous_batching` of a model that was bound for the rows of one batch.

    Raises:
        UnsupportedError: always; the message says what serves instead.
    """
    raise UnsupportedError(
        "continuous batching packs the tokens of several requests into one row, anew in each step, "
        "so a model bound for the rows of one batch can't take part; for an adapter per request: "
        "ll.bind_requests(model, adapters).generate_batch(prompts, adapters=[...])"
    )


def settings_of(given: Any) -> Any:
    """A ContinuousBatchingConfig for requests with adapters of their own.

    Blocks of the cache aren't shared between requests with the same prompt: what one adapter wrote
    isn't right for another. A step's call isn't recorded, because the next one has other adapters,
    and isn't prepared while another one runs.

    Args:
        given: the user's config, which stays as it is; None for the default.

    Raises:
        UnsupportedError: the user's config asks for recorded or overlapping calls, or transformers
            is too old to be asked for the opposite.
    """
    try:
        from transformers.generation import ContinuousBatchingConfig
    except ImportError as error:
        raise UnsupportedError(
            f"continuous batching with an adapter per request needs a newer transformers, which "
            f"has ContinuousBatchingConfig ({error})"
        ) from error

    config = ContinuousBatchingConfig() if given is None else copy.copy(given)
    asked = {
        "use_cuda_graph": any(config.cuda_graph_booleans),
        "use_async_batching": config.use_async_batching,
        "q_padding_interval_size": config.q_padding_interval_size,
        "kv_padding_interval_size": config.kv_padding_interval_size,
        "varlen_compile_config": config.varlen_compile_config,
        "decode_compile_config": config.decode_compile_config,
        "default_compile_level": config.default_compile_level,
    }
    odd = [name for name, value in asked.items() if value]
    if odd:
        raise UnsupportedError(
            f"continuous batching with an adapter per request: {', '.join(odd)}: a recorded or "
            f"compiled call keeps the adapters of the step that it was made in, and the next step "
            f"has others; leave it at its default"
        )
    config.allow_block_sharing = False
    config.use_cuda_graph = config.use_async_batching = False
    return config


class Requests:
    """The requests of one manager, and the adapter of each.

    Attributes:
        error: what a step refused. Transformers makes a string of it.
    """

    def __init__(self, manager: Any) -> None:
        self.error: LoraLiteError | None = None
        self._manager = weakref.ref(manager)
        self._lock = threading.Lock()
        self._adapters: dict[str, Any] = {}
        self._begun: set[str] = set()
        self._count = self._steps = 0

    def add(self, request_id: str | None, adapter: Any) -> str:
        """Note a request's adapter; returns the request's id, which is made where it is None."""
        with self._lock:
            if request_id is None:
                request_id = f"request_{self._count}"
                self._count += 1
            self._adapters[request_id] = adapter
            self._begun.discard(request_id)
        return request_id

    def runs(self, cache: Any) -> bool:
        """Whether a call with this cache is a step of the manager."""
        processor = getattr(self._manager(), "batch_processor", None)
        return cache is not None and getattr(processor, "cache", None) is cache

    def of_step(self) -> list[tuple[Any, int]]:
        """(adapter, number of tokens) of each request in the step that runs now, in the order of
        its row.

        Raises:
            UnsupportedError: this version of transformers keeps no record of that.
        """
        manager: Any = self._manager()
        try:
            step = manager.batch_processor.inputs_and_outputs.requests_in_batch
            found = [(one.state.request_id, one.query_length) for one in step]
        except AttributeError as error:
            raise UnsupportedError(
                f"this version of transformers doesn't say which requests a step of continuous "
                f"batching has ({error}); bind one adapter at a time: ll.bind(model, adapter)"
            ) from error
        with self._lock:
            names = [self._name(request_id) for request_id, _ in found]
            self._begun.update(names)
            self._steps += 1
            if self._steps % _FORGET_EVERY == 0:
                self._forget(manager.batch_processor.scheduler)
            return [(self._adapters[name], n) for name, (_, n) in zip(names, found, strict=True)]

    def _name(self, request_id: str) -> str:
        """The id that a request was added with; further answers to its prompt have longer ones."""
        return request_id if request_id in self._adapters else request_id.partition(_CHILD)[0]

    def _forget(self, scheduler: Any) -> None:
        """Forget the requests that are done."""
        unfinished = (*scheduler.active_requests, *scheduler.waiting_requests)
        done = self._begun - {self._name(request_id) for request_id in unfinished}
        for name in done:
            del self._adapters[name]
        self._begun -= done


_CHILD = "__child#"
"""What stands between a request's id and the number of one of its further answers."""

_FORGET_EVERY = 256
"""After so many steps the requests that are done are forgotten."""
