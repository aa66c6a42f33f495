"""What a model for continuous batching does where its class does another thing: its calls are steps
of several requests, each of which has its own adapter.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from ..algebra.bank import Bank
from ..algebra.flatten import flatten
from ..algebra.rows import Id, rows
from ..core.adapter import Adapter
from ..core.errors import LoraLiteError, StructureError, UnsupportedError
from ..core.torch_internals import CALL_HOOKS
from ..interop.continuous_batching import Requests, settings_of
from .functional import functional

__all__ = ["RequestServer"]


class _Call:
    """One call of `generate_batch` or `add_requests`.

    Attributes:
        adapters: those of its prompts that weren't added yet.
        requests: its manager's.
    """

    def __init__(self, adapters: Iterable[Id]) -> None:
        self.adapters: Iterator[Id] = iter(adapters)
        self.requests: Requests | None = None


_CALL: ContextVar[_Call | None] = ContextVar("_CALL", default=None)

_MISSING: Any = object()


class RequestServer:
    """The calls of a module of `bind_requests`, and the methods that begin continuous batching.

    Attributes:
        served: the module.
        base: the same module as its class has it; tensors and children are the same.
        adapters: the stack, or the bank.
        requests: {manager: its requests}.
    """

    def __init__(self, served: Any, adapters: Any, flattened: str | Sequence[str]) -> None:
        self.served, self.adapters, self.flattened = served, adapters, flattened
        self.base: Any = object.__new__(type(served))
        self.base.__dict__.update(served.__dict__)
        for name in CALL_HOOKS:  # the module's own call runs them
            self.base.__dict__[name] = type(served.__dict__[name])()
        self.requests: weakref.WeakKeyDictionary[Any, Requests] = weakref.WeakKeyDictionary()
        self._prepare(self._stack())

    # ------------------------------------------------------------------------------ one step's call
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A step of continuous batching."""
        cache = kwargs.get("cache")
        for requests in list(self.requests.values()):
            if requests.runs(cache):
                try:
                    return self._step(requests, args, kwargs)
                except LoraLiteError as error:
                    requests.error = error
                    raise
        raise UnsupportedError(
            "a module of ll.bind_requests runs in continuous batching alone (generate_batch, "
            "init_continuous_batching), which knows whose tokens a call has; for a batch of rows "
            "take ll.bind(model, ll.rows(adapters, ids))"
        )

    def _step(self, requests: Requests, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stack, step = self._stack(), requests.of_step()
        if tuple(stack) != self._sites:
            self._prepare(stack)
        members = rows(stack, [adapter for adapter, _ in step]).ids
        ids = members.repeat_interleave(torch.tensor([tokens for _, tokens in step]))
        found = tuple(kwargs["input_ids"].shape)
        if found != (1, len(ids)):
            raise UnsupportedError(
                f"a step of continuous batching has input_ids of shape {found}, but its requests "
                f"have {len(ids)} tokens; this version of transformers packs them in another way"
            )
        # An adapted head gets all tokens, because it is told by their places whose they are.
        keep = kwargs.pop("logits_to_keep", None) if self._adapts_head else None
        given = rows(stack, ids[None], flattened=self.flattened)
        result = self._function(given, *args, **kwargs)
        if keep is not None:
            result.logits = result.logits[:, keep]
        return result

    def _stack(self) -> Adapter:
        return self.adapters.snapshot() if isinstance(self.adapters, Bank) else self.adapters

    def _prepare(self, stack: Adapter) -> None:
        """Make what serves for all steps with a stack on these sites."""
        flatten(rows(stack, []))  # refuses what is no stack, or acts at some tokens alone
        self._sites: tuple[str, ...] = tuple(stack)
        self._function: Callable[..., Any] = functional(self.base, stack)
        ends = (self.base.get_input_embeddings(), self.base.get_output_embeddings())
        modules = dict(self.base.named_modules())
        self._adapts_head = any(
            end is not None and modules.get(path) is end for path in stack for end in ends
        )

    # ---------------------------------------------------------------- in the place of transformers'
    def generate_batch(self, inputs: Any, *args: Any, adapters: Any = None, **kwargs: Any) -> Any:
        """`generate_batch` with an adapter for each prompt."""
        call = _Call(self._checked(adapters, len(inputs), "generate_batch"))
        token = _CALL.set(call)
        try:
            results = type(self.served).generate_batch(self.served, inputs, *args, **kwargs)
        finally:
            _CALL.reset(token)
        if call.requests is not None and call.requests.error is not None:
            raise call.requests.error
        return results

    def init_continuous_batching(
        self,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`init_continuous_batching`, whose manager takes an adapter with each request."""
        older = generation_config or getattr(self.served, "generation_config", None)
        given = continuous_batching_config or getattr(older, "continuous_batching_config", None)
        make = type(self.served).init_continuous_batching
        manager = make(self.served, generation_config, settings_of(given), *args, **kwargs)
        if manager not in self.requests:
            requests = self.requests[manager] = Requests(manager)
            manager.add_request = functools.partial(
                self._add_request, requests, manager.add_request
            )
            manager.add_requests = functools.partial(self._add_requests, manager.add_requests)
        call = _CALL.get()
        if call is not None:
            call.requests = self.requests[manager]
        return manager

    def _add_request(
        self,
        requests: Requests,
        add: Callable[..., Any],
        input_ids: Any,
        request_id: str | None = None,
        *args: Any,
        adapter: Any = _MISSING,
        **kwargs: Any,
    ) -> Any:
        call = _CALL.get()
        if adapter is not _MISSING:
            rows(self._stack(), [adapter])  # refuses one that isn't there
        elif call is not None:
            adapter = next(call.adapters)
        else:
            raise StructureError(
                "add_request: expected adapter=, a member of the set, or None for the bare base"
            )
        return add(input_ids, requests.add(request_id, adapter), *args, **kwargs)

    def _add_requests(
        self, add: Callable[..., Any], inputs: Any, *args: Any, adapters: Any = None, **kwargs: Any
    ) -> Any:
        if adapters is None and _CALL.get() is not None:  # those of generate_batch
            return add(inputs, *args, **kwargs)
        token = _CALL.set(_Call(self._checked(adapters, len(inputs), "add_requests")))
        try:
            return add(inputs, *args, **kwargs)
        finally:
            _CALL.reset(token)

    def _checked(self, adapters: Any, count: int, what: str) -> list[Id]:
        """The adapters of so many prompts."""
        if isinstance(adapters, str) or not isinstance(adapters, Iterable):
            raise StructureError(
                f"{what}: expected adapters=[...], one for each of {count} prompts (None is the "
                f"bare base), found {type(adapters).__name__}"
            )
        found = list(adapters)
        if len(found) != count:
            raise StructureError(
                f"{what}: expected an adapter for each of {count} prompts, found {len(found)}"
            )
        rows(self._stack(), found)  # refuses one that isn't there
        return found
