"""Gradients of a loss in adapters: what torch.func gives, at the price of `loss.backward()`."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..core.arguments import flag, function, whole
from ..core.errors import StructureError, short_repr
from ..core.torch_internals import is_recorded

__all__ = ["grad", "value_and_grad"]

Argnums = int | tuple[int, ...]

_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("inside", default=False)
"""Whether a loss is being differentiated on fresh leaves in this thread: a gradient asked for in it
may be differentiated in turn.
"""


def value_and_grad(
    loss: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """A function that gives a loss and its gradient.

    `value, grads = ll.value_and_grad(loss)(params, x)`. The numbers are those of
    `torch.func.grad_and_value`. Where no transform is around, autograd computes them on fresh
    leaves that share the arguments' storage: a step then costs what `.backward()` on a bound model
    costs, works under gradient checkpointing (`use_reentrant=False`), and nothing is written on the
    arguments (no `.grad`). Inside a transform of torch.func, a compiled or traced function or
    another `ll.grad`, and where an argument itself requires a gradient (so that the gradients can
    be differentiated in turn), torch.func computes them.

    As in torch.func, every floating or complex leaf of the arguments named gets a gradient, zero
    where the loss doesn't depend on it (frozen leaves of an adapter), and absent leaves of a
    partition stay absent. Two things differ. Integer and bool leaves (indices) get zeros of their
    own dtype. And what the loss takes from outside its arguments is a constant: to differentiate
    the gradients in it (by `.backward()`), make it an argument that requires a gradient, or nest
    torch.func's or these transforms.

    Args:
        loss: a function of tensors in any pytree (an Adapter, a tuple or dict of them, a dict of
            tensors ...) that gives a real scalar tensor (); with `has_aux` a pair of that and
            anything else.
        argnums: which positional argument to differentiate in, or a tuple of several.
        has_aux: whether the loss gives a pair.

    Returns:
        A function of the loss' arguments that gives (value, gradients), or ((value, aux),
        gradients): gradients are shaped like the argument, or a tuple of such for a tuple of
        argnums; value and aux have no graph.

    Raises:
        StructureError: in the call, an argnum that isn't there, an argument that holds something
            else than tensors, or a loss that isn't a real scalar tensor (or no pair).
    """

    function(loss, "grad: loss")
    flag(has_aux, "grad: has_aux")
    for number in argnums if isinstance(argnums, tuple) else (argnums,):
        whole(number, "grad: argnums")

    @functools.wraps(loss)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        chosen = _chosen(argnums, len(args))
        leaves, form = pytree.tree_flatten([args[i] for i in chosen])
        _check_leaves(leaves)
        moving = [t.is_floating_point() or t.is_complex() for t in leaves]

        def call(live: list[Tensor]) -> tuple[Tensor, Any]:
            these = iter(live)
            given = [next(these) if moves else t for t, moves in zip(leaves, moving, strict=True)]
            whole = dict(zip(chosen, pytree.tree_unflatten(given, form), strict=True))
            positional = (whole.get(i, arg) for i, arg in enumerate(args))
            return _pair(loss(*positional, **kwargs), has_aux)

        live = [t for t, moves in zip(leaves, moving, strict=True) if moves]
        way = _by_torch_func if _is_surrounded(args, kwargs) else _on_fresh_leaves
        value, aux, made = way(call, live)
        found = iter(made)
        grads = pytree.tree_unflatten(
            [
                next(found) if moves else torch.zeros_like(t)
                for t, moves in zip(leaves, moving, strict=True)
            ],
            form,
        )
        of = tuple(grads) if isinstance(argnums, tuple) else grads[0]
        return ((value, aux) if has_aux else value), of

    return wrapped


def grad(
    loss: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """A function that gives a loss' gradient: `grads = ll.grad(loss)(params, x)`.

    What `torch.func.grad` gives, computed as `ll.value_and_grad` says. With `has_aux` it gives
    (gradients, aux).

    Args:
        loss: as in `value_and_grad`.
        argnums: which positional argument to differentiate in, or a tuple of several.
        has_aux: whether the loss gives a pair (scalar, aux).

    Raises:
        StructureError: as `value_and_grad`.
    """
    both = value_and_grad(loss, argnums, has_aux)

    @functools.wraps(loss)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return wrapped


Call = Callable[[list[Tensor]], tuple[Tensor, Any]]
"""The floating leaves to (value, aux)."""


def _is_surrounded(args: Any, kwargs: Any) -> bool:
    """Whether the gradients may be differentiated, batched or recorded in turn."""
    # the compiler knows no context variables, so they are asked last
    return is_recorded((args, kwargs)) or _inside.get()


def _by_torch_func(call: Call, leaves: list[Tensor]) -> tuple[Tensor, Any, list[Tensor]]:
    seen: list[Any] = []

    def tensors_alone(live: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        value, aux = call(live)
        flat, form = pytree.tree_flatten(aux)
        seen[:] = [flat, form]
        return value, [t for t in flat if isinstance(t, Tensor)]  # torch allows nothing else in aux

    grads, (value, tensors) = torch.func.grad_and_value(tensors_alone, has_aux=True)(leaves)
    flat, form = seen
    found = iter(tensors)
    aux = pytree.tree_unflatten([next(found) if isinstance(t, Tensor) else t for t in flat], form)
    return value, aux, grads


def _on_fresh_leaves(call: Call, leaves: list[Tensor]) -> tuple[Tensor, Any, list[Tensor]]:
    with torch.inference_mode(False), torch.enable_grad():
        fresh = [(t.clone() if t.is_inference() else t).detach().requires_grad_() for t in leaves]
        token = _inside.set(True)
        try:
            value, aux = call(fresh)
        finally:
            _inside.reset(token)
        if value.requires_grad and fresh:
            grads = list(torch.autograd.grad(value, fresh, materialize_grads=True))
        else:  # the loss doesn't depend on them
            grads = [torch.zeros_like(t, requires_grad=False) for t in fresh]
        return value.detach(), pytree.tree_map(_without_graph, aux), grads


def _without_graph(t: Any) -> Any:
    return t.detach() if isinstance(t, Tensor) else t


# -------------------------------------------------------------------------------------- what fits
def _chosen(argnums: Argnums, count: int) -> tuple[int, ...]:
    """The arguments' numbers, from 0."""
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    for i in numbers:
        if isinstance(i, bool) or not isinstance(i, int) or not -count <= i < count:
            raise StructureError(
                f"grad: argnums: expected positional arguments 0 to {count - 1}, found "
                f"{short_repr(argnums)}"
            )
    chosen = tuple(i % count for i in numbers)
    if not chosen or len(set(chosen)) != len(chosen):
        raise StructureError(
            f"grad: argnums: expected one number, or several that differ, found "
            f"{short_repr(argnums)}"
        )
    return chosen


def _check_leaves(leaves: list[Any]) -> None:
    """Refuse an argument that holds something else than tensors."""
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise StructureError(
                f"grad: expected tensors in the arguments to differentiate in, found "
                f"{short_repr(leaf)}; take it from outside the loss, or as another argument"
            )


def _pair(result: Any, has_aux: bool) -> tuple[Tensor, Any]:
    """(the loss' value, aux), checked."""
    aux = None
    if has_aux:
        if not isinstance(result, tuple) or len(result) != 2:
            raise StructureError(
                f"grad: with has_aux=True expected the loss to give (value, aux), found "
                f"{type(result).__name__}"
            )
        result, aux = result
    if not isinstance(result, Tensor) or result.ndim or not result.is_floating_point():
        found = type(result).__name__
        if isinstance(result, Tensor):
            found = f"{result.dtype} of shape {tuple(result.shape)}"
        raise StructureError(
            f"grad: expected the loss to be a real scalar tensor (), found {found}"
            + ("; with has_aux=True it may be (value, aux)" if isinstance(result, tuple) else "")
        )
    return result, aux
