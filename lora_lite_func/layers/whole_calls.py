"""Models whose whole call can be adapted, as those of transformers are: what they take, and how
they embed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedError
from ..core.torch_internals import at_trace_time
from ..core.weak_memo import WeakMemo
from .signatures import arguments_of

__all__ = [
    "CACHES",
    "TokenTable",
    "given_cache",
    "has_cache",
    "has_encoder",
    "is_causal",
    "predicts_next",
    "takes_tokens",
    "token_size",
    "token_table",
]

CACHES = ("cache", "past_key_values")
"""What releases of transformers call the argument for a key-value cache."""

_EMBEDDED, _ENCODED = "inputs_embeds", "encoder_outputs"


def token_table(module: Any) -> Any:
    """The module that embeds a model's tokens; None for a module that names none."""
    named = getattr(module, "get_input_embeddings", None)
    try:
        table = named() if callable(named) else None
    except (NotImplementedError, AttributeError):
        return None
    return table if isinstance(stored_table(table), Tensor) else None


def stored_table(table: Any) -> Any:
    """The stored rows (ids, width) of a module that embeds tokens."""
    return getattr(table, "_parameters", {}).get("weight")


class TokenTable:
    """A model's own embedding of tokens, as a method's start may read it.

    Attributes:
        size: how many ids there are.
        decodes: whether the model encodes its tokens and decodes others.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self._table = token_table(module)
        self.size = int(stored_table(self._table).shape[0])
        self.decodes = has_encoder(module)

    def __call__(self, ids: Tensor) -> Tensor:
        """The embedded tokens (n, width) of ids (n,), as the model's call has them."""
        device = stored_table(self._table).device
        with torch.no_grad():
            made: Tensor = self._table(ids.to(device))
        return made.detach().float()

    def cached(self, ids: Tensor) -> Tensor:
        """What the model's cache holds after a text (n,): keys and values (layers, 2, n, width).

        Raises:
            UnsupportedError: the model encodes and decodes, so a text has no keys of its own there.
        """
        if has_encoder(self._module):
            raise UnsupportedError(
                f"{type(self._module).__name__}: it encodes and decodes, and its cache is of what "
                f"it decodes; start without token_ids"
            )
        device = stored_table(self._table).device
        with torch.no_grad():
            result = self._module(input_ids=ids[None].to(device), use_cache=True)
        layers = given_cache(dict(result.items()))[1].layers
        pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in layers]
        return torch.stack(pairs).transpose(2, 3).flatten(3).detach().float()


# --------------------------------------------------------------------------------- virtual tokens
class _Arguments(NamedTuple):
    """What a class's forward takes.

    Attributes:
        tokens: whether it is embedded tokens, in a way that virtual ones may stand among them.
        cache: whether it is a cache.
        encoded: whether it is what was encoded.
    """

    tokens: bool
    cache: bool
    encoded: bool


def _of_class(cls: Any) -> _Arguments:
    if not callable(getattr(cls, "get_input_embeddings", None)):
        return _Arguments(False, False, False)
    names = arguments_of(cls)
    cache, encoded = any(name in names for name in CACHES), _ENCODED in names
    finds_last = any(base.__name__.endswith("ForSequenceClassification") for base in cls.__mro__)
    tokens = _EMBEDDED in names and not (finds_last and cache and not encoded)
    return _Arguments(tokens, cache, encoded)


_ARGUMENTS = WeakMemo(_of_class)


@at_trace_time
def _taken(cls: type) -> _Arguments:
    return _ARGUMENTS(cls)


def takes_tokens(module: Any) -> bool:
    """Whether virtual tokens can stand in front of a module's own, by its arguments.

    A classifier of causal sequences isn't such a module: it finds each row's last token in the ids,
    which virtual tokens leave it without. The model inside it is.
    """
    return _taken(type(module)).tokens and token_table(module) is not None


def token_size(module: Any) -> tuple[int, int] | None:
    """(width, width) of a model's embedded tokens; None for a module that takes none.

    Raises:
        UnsupportedError: the model looks its ids up in each layer too.
    """
    if not takes_tokens(module):
        return None
    config = getattr(module, "config", None)
    of_text = getattr(config, "get_text_config", lambda: config)()
    if getattr(of_text, "hidden_size_per_layer_input", 0):
        raise UnsupportedError(
            f"{type(module).__name__}: its layers look the ids up in tables of their own, and "
            f"virtual tokens have no ids; take virtual keys and values, or a LoRA"
        )
    table = token_table(module)
    # a table may hold another width than it gives (an embedding in factors)
    width = int(getattr(table, "embedding_dim", stored_table(table).shape[-1]))
    return width, width


def has_cache(module: Any) -> bool:
    """Whether a model's call takes a key-value cache."""
    return _taken(type(module)).cache


def has_encoder(module: Any) -> bool:
    """Whether a model encodes its tokens and decodes others."""
    return _taken(type(module)).encoded


def is_causal(module: Any) -> bool:
    """Whether a model's tokens see earlier ones alone, so that calls may go on from a cache."""
    if not _taken(type(module)).cache or has_encoder(module):
        return False
    for part in module.modules():
        said = part.__dict__.get("is_causal")
        if isinstance(said, bool):
            return said
    return True


def predicts_next(module: Any) -> bool:
    """Whether a model predicts each token from those before it, so that its loss takes the label of
    the next one.
    """
    head = getattr(module, "get_output_embeddings", None)
    return is_causal(module) and callable(head) and head() is not None


def given_cache(arguments: Mapping[str, Any]) -> tuple[str, Any]:
    """(the name of a call's cache, the cache); ("", None) where it has none."""
    for name in CACHES:
        if arguments.get(name) is not None:
            return name, arguments[name]
    return "", None
