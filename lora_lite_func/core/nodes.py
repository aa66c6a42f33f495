"""Registering a class as a pytree node, with torch and with optree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
) -> None:
    """Make a class a pytree node, in optree in every namespace.

    Args:
        cls: the class.
        flatten: value -> (children, what is static).
        unflatten: (children, what is static) -> value.
    """
    torch_pytree.register_pytree_node(cls, flatten, unflatten)
    register: Any = optree.register_pytree_node  # its type stubs only allow collections of strings
    everywhere = getattr(optree.registry, "__GLOBAL_NAMESPACE")
    register(
        cls, flatten, lambda static, children: unflatten(children, static), namespace=everywhere
    )
