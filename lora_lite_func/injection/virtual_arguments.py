"""A call's arguments with virtual tokens in front of each row: the tokens themselves, masks, labels
and positions.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core.errors import UnsupportedError
from ..layers.whole_calls import predicts_next, token_table
from .virtual_front import Front

__all__ = ["Given", "batch_of", "embedded", "going_on", "in_front", "mask_given"]

Given: TypeAlias = dict[str, Any]
"""A call's arguments by name."""

_MASK, _POSITIONS = "attention_mask", "position_ids"
_FILLED = {"token_type_ids": 0, "labels": -100}
"""What stands for virtual tokens in arguments that have a number for each token."""

_SPANS = ("start_positions", "end_positions")
"""Labels that are places in the row."""


def batch_of(given: Given, path: str, of: str = "") -> tuple[int, int, Any]:
    """(N, T, device) of a call's tokens.

    Args:
        given: the call's arguments.
        path: of the site, for messages.
        of: what the names of arguments begin with: "decoder_" for tokens that are decoded.

    Raises:
        UnsupportedError: it has none, or not in rows.
    """
    decoded = (("labels", 2), ("input_ids", 2)) if of else ()
    for name, dims in ((f"{of}input_ids", 2), (f"{of}inputs_embeds", 3), *decoded):
        tokens = given.get(name)
        if isinstance(tokens, Tensor):
            if tokens.ndim != dims:
                raise UnsupportedError(
                    f"{path!r}: virtual tokens stand in front of rows of tokens; expected {name} "
                    f"of {dims} dimensions, found {tuple(tokens.shape)}; adapt the model inside "
                    f"(target_names)"
                )
            return tokens.shape[0], tokens.shape[1], tokens.device
    raise UnsupportedError(
        f"{path!r}: the call has no tokens (input_ids, inputs_embeds) to put virtual ones in front "
        f"of; found {', '.join(k for k, v in given.items() if v is not None) or 'nothing'}"
    )


def mask_given(given: Given, path: str, of: str = "") -> Tensor | None:
    """The call's attention mask (N, T); of the tokens that are decoded where `of` is "decoder_".

    Raises:
        UnsupportedError: it has another form, in which virtual tokens have no place.
    """
    mask = given.get(of + _MASK)
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise UnsupportedError(
        f"{path!r}: virtual tokens have no place in this {of}{_MASK} ({found}); give one of the "
        f"tokens, (N, T)"
    )


def embedded(module: Any, given: Given) -> Tensor:
    """The call's own tokens, embedded (N, T, width)."""
    own = given.get("inputs_embeds")
    made: Tensor = token_table(module)(given["input_ids"]) if own is None else own
    return made


def in_front(
    front: Front,
    values: Tensor,
    module: Any,
    given: Given,
    names: Any,
    causal: bool,
    path: str,
    labels: Tensor | None = None,
) -> tuple[Given, Front]:
    """(the arguments with virtual tokens in front of the call's own, where those stand).

    Args:
        front: the virtual tokens' places.
        values: (N, P, width), those that a row uses first.
        module: the model.
        given: the call's arguments.
        names: of the arguments that the model takes.
        causal: whether its calls may go on from a cache.
        path: of the site, for messages.
        labels: (N, P) of the virtual tokens, likewise; None where the loss counts none.

    Raises:
        UnsupportedError: an argument in which virtual tokens have no place.
    """
    rows, tokens, device = batch_of(given, path)
    own = embedded(module, given)
    mask = front.mask(mask_given(given, path), rows, tokens, device)
    if not causal:
        front = front.packed(mask)
    values = front.aligned(values, 1).to(own)
    made = {k: v for k, v in given.items() if k not in ("input_ids", "cache_position")}
    made["inputs_embeds"] = front.join(values, own)
    if mask is not None:
        made[_MASK] = front.joined_mask(mask)
    if made.get(_POSITIONS) is not None:
        made[_POSITIONS] = front.positions(made[_POSITIONS])
    elif causal and mask is not None and _POSITIONS in names:
        made[_POSITIONS] = _counted(mask)
    for name, value in _FILLED.items():
        if _is_of_tokens(made.get(name), rows, tokens):
            made[name] = front.fill(made[name], value)
    if labels is not None and given.get("labels") is not None:
        made["labels"] = front.join(front.aligned(labels, 1).to(given["labels"]), given["labels"])
    if front.lengths is not None and made.get("labels") is not None and predicts_next(module):
        made["labels"] = _without_first(made["labels"], front)
    for name in _SPANS:
        if made.get(name) is not None:
            made[name] = made[name] + front.counted(made[name].device)
    if isinstance(made.get("logits_to_keep"), Tensor):
        made["logits_to_keep"] = made["logits_to_keep"] + front.slots
    _check_others(made, given, rows, tokens, path)
    return made, front


def going_on(front: Front, given: Given, names: Any, before: int, path: str, of: str = "") -> Given:
    """The arguments of a call that goes on from a cache which has the virtual tokens.

    Args:
        front: the virtual tokens' places.
        given: the call's arguments.
        names: of the arguments that the model takes.
        before: how many tokens the cache has that `given`'s mask would count.
        path: of the site, for messages.
        of: what the names of arguments begin with, as in `batch_of`.
    """
    rows, tokens, device = batch_of(given, path, of)
    mask = front.mask(mask_given(given, path, of), rows, before + tokens, device)
    made = {k: v for k, v in given.items() if k != "cache_position"}
    positions = of + _POSITIONS
    if mask is not None:
        made[of + _MASK] = mask
    if made.get(positions) is not None:
        made[positions] = made[positions] + front.counted(made[positions].device)
    elif mask is not None and positions in names:
        made[positions] = _counted(mask)[:, -tokens:]
    return made


def _counted(mask: Tensor) -> Tensor:
    """Positions that count what a mask leaves."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _without_first(labels: Tensor, front: Front) -> Tensor:
    """Labels (N, P + T) that don't count the first own token of a row without virtual ones, which
    nothing comes before.
    """
    assert front.lengths is not None
    place = torch.arange(labels.shape[1], device=labels.device)
    bare = front.lengths.to(labels.device)[:, None] == 0
    return labels.masked_fill(bare & (place == front.slots), -100)


def _is_of_tokens(value: Any, rows: int, tokens: int) -> bool:
    return (
        isinstance(value, Tensor)
        and not value.is_floating_point()
        and tuple(value.shape[:2]) == (rows, tokens)
    )


def _check_others(made: Given, given: Given, rows: int, tokens: int, path: str) -> None:
    """Refuse an argument that has something for each token, of which it isn't known what.

    Raises:
        UnsupportedError: there is one.
    """
    for name, value in made.items():
        unchanged = isinstance(value, Tensor) and value is given.get(name)
        if unchanged and tokens > 1 and tuple(value.shape[:2]) == (rows, tokens):
            raise UnsupportedError(
                f"{path!r}: {name} {tuple(value.shape)} has something for each token, and what "
                f"stands there for virtual tokens isn't known; leave it out, or adapt the model "
                f"inside (target_names)"
            )
