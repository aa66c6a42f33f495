"""Registering a class as a pytree node, with torch and with optree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import optree
import torch.utils._pytree as torch_pytree

__all__ = ["register_node"]

T = TypeVar("T")
Static = TypeVar("Static")


def register_node(
    cls: type[T],
    flatten: Callable[[T], tuple[list[Any], Static]],
    unflatten: Callable[[Iterable[Any], Static], T],
    keys: Callable[[T], Sequence[Any]] | None = None,
    **for_torch: Any,
) -> None:
    """Make a class a pytree node, in optree in every namespace.

    Args:
        cls: the class.
        flatten: value -> (children, what is static).
        unflatten: (children, what is static) -> value.
        keys: value -> a key for each child; None leaves them numbered.
        **for_torch: what torch's registration takes besides.
    """

    def with_torch_keys(value: T) -> tuple[list[tuple[Any, Any]], Static]:
        children, static = flatten(value)
        assert keys is not None
        named: Iterable[Any] = map(torch_pytree.MappingKey, keys(value))
        return list(zip(named, children, strict=True)), static

    def with_entries(value: T) -> tuple[Any, ...]:
        children, static = flatten(value)
        return (children, static) if keys is None else (children, static, tuple(keys(value)))

    if keys is not None:
        for_torch["flatten_with_keys_fn"] = with_torch_keys
    torch_pytree.register_pytree_node(cls, flatten, unflatten, **for_torch)
    register: Any = optree.register_pytree_node  # its type stubs only allow collections of strings
    # by getattr, since Python would mangle the name inside a class
    everywhere = getattr(optree.registry, "__GLOBAL_NAMESPACE")
    register(
        cls,
        with_entries,
        lambda static, children: unflatten(children, static),
        namespace=everywhere,
    )
