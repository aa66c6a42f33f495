"""Public names pinned to the package's root, so that what is pickled survives a move of a file."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any

__all__ = ["pin"]


def pin(names: Iterable[str], namespace: Mapping[str, Any], module: str) -> None:
    """Let classes and functions say that they are of this module, where they have these names.

    pickle, and whatever prints where a thing is from, then name it by the root. Annotations of a
    class are texts, which typing evaluates in the class's module; so they are evaluated before.

    Args:
        names: the names of the classes and functions.
        namespace: where these are found now.
        module: the name of the module that they say.
    """
    for name in names:
        value = namespace[name]
        if isinstance(value, type):
            _evaluate(value)
        if isinstance(value, (type, FunctionType)):
            value.__module__ = module


def _evaluate(cls: type) -> None:
    """Replace a class's own annotations that are texts by what they mean."""
    own = inspect.get_annotations(cls)
    scope = {**vars(sys.modules[cls.__module__]), cls.__name__: cls}
    for name, annotation in own.items():
        text = getattr(annotation, "__forward_arg__", annotation)  # as a NamedTuple has them
        if isinstance(text, str):
            with contextlib.suppress(NameError):  # imported for a type checker alone
                own[name] = eval(text, scope)
    if own:
        cls.__annotations__ = own
