"""A site's weight as a model reads it without calling the layer (`F.linear(x, layer.weight)`).

What is read is the adapted weight. It is made only when it is used, so questions about its shape,
dtype or device, which models ask in every call, cost nothing. A site's own call reads its stored
tensors, because it runs on a plain object of the layer's class (stand_in.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedError
from ..core.torch_internals import (
    is_differentiated,
    is_traced,
    is_tracing_here,
    is_transformed,
    is_watched,
    is_wrapped,
    not_compiled,
    outside_transforms,
    plain_tensors,
    tensor_without_values,
    with_notes,
    without_saved_hooks,
    writes_on,
)

__all__ = ["LazyWeight", "lazily", "waits"]


# ------------------------------------------------------------------------------- the weight as read
@dataclass(frozen=True, eq=False)
class _Recipe:
    """How an adapted weight is made.

    Attributes:
        path: the path of the weight, for messages.
        tensors: all tensors that it depends on and for which a gradient may be wanted.
        make: makes the weight from those tensors.
    """

    path: str
    tensors: Sequence[Tensor]
    make: Callable[..., Tensor]


def waits(stored: Tensor | None) -> bool:
    """Whether the adapted form of a stored tensor can be made when it is used.

    A graph that is recorded for other values takes the weight itself, because it leaves out what
    nobody uses. A stored tensor of a kind of its own (sharded, packed) has no empty form to wait
    in.
    """
    return type(stored) in _DENSE and not is_tracing_here() and not is_traced()


_DENSE = (Tensor, nn.Parameter)


def lazily(
    path: str, stored: Tensor, tensors: Sequence[Tensor], make: Callable[..., Tensor]
) -> Tensor:
    """The adapted weight of a site for code that reads it, to be made when it is used.

    A tensor that torch.func or forward mode follows has a meaning only for operations that go
    through all of its levels, and operations in C++ needn't. So a weight that depends on such
    tensors is made at once.

    Args:
        path: the path of the weight, for messages.
        stored: the layer's own weight, whose shape, dtype and device the adapted one has.
        tensors: the tensors that the weight is made of and for which a gradient may be wanted.
        make: makes the weight from those tensors.
    """
    if is_differentiated() or any(map(is_wrapped, (stored, *tensors))):
        return make(*tensors)
    recipe = _Recipe(path, tensors, make)
    if torch.is_inference_mode_enabled() or not any(t.requires_grad for t in tensors):
        return LazyWeight(recipe, stored)
    with torch.enable_grad(), _at_level_0():
        read: Tensor = _Read.apply(recipe, stored, *tensors)
    return read


def _at_level_0() -> AbstractContextManager[Any]:
    return outside_transforms() if is_transformed() else nullcontext()


class LazyWeight(Tensor):
    """An adapted weight that is made when it is used. It can't be written on.

    It is a real tensor: it has the weight's shape, dtype, device and place in the graph of
    gradients, but no memory. Uses in Python come to `__torch_function__`. Uses in C++ (TorchScript,
    operators of extensions, transforms of torch.func over it) come to `__torch_dispatch__`. Each
    goes on with the weight itself. Code in C++ that asks for its memory gets torch's error.
    """

    _recipe: _Recipe
    _made: tuple[tuple[int, ...], Tensor] | None
    _is_param: bool

    @staticmethod
    def __new__(cls, recipe: _Recipe, stored: Tensor) -> LazyWeight:
        made: LazyWeight = tensor_without_values(cls, stored)
        with_notes(made, stored)
        for name, value in (
            ("_recipe", recipe),
            ("_made", None),
            ("_is_param", isinstance(stored, nn.Parameter)),
        ):
            object.__setattr__(made, name, value)
        return made

    def __init__(self, *_: Any) -> None:
        """Do nothing: `__new__` has made the tensor."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _KEPT_BY_TORCH:
            raise _read_only(self, name)
        object.__setattr__(self, name, value)

    @classmethod
    @not_compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in _ASKED:
            with plain_tensors():
                return func(*args, **named)
        if func is Tensor.__deepcopy__:
            return _differentiable(args[0]).detach().clone()
        name = str(_WRITES.get(func) or getattr(func, "__name__", ""))
        _refuse_writes(name, args, named)
        return func(*_used(args, _differentiable), **_used(named, _differentiable))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        for value in writes_on(func, args, named):
            if type(value) is LazyWeight:
                raise _read_only(value, str(func))
        return func(*_used(args, _values), **_used(named, _values))


_PROPERTIES = (
    *("dtype", "shape", "device", "layout", "ndim", "itemsize", "nbytes", "is_meta", "is_cuda"),
    *("is_cpu", "is_xpu", "is_mps", "is_sparse", "is_quantized", "is_nested", "requires_grad"),
    *("is_leaf", "grad_fn", "grad", "retains_grad", "output_nr"),
)
_METHODS = (
    *("dim", "size", "stride", "numel", "nelement", "element_size", "get_device", "is_signed"),
    *("is_floating_point", "is_complex", "is_contiguous", "__hash__", "register_hook"),
    *("retain_grad", "register_post_accumulate_grad_hook"),
)
_ASKED = frozenset(
    [getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)]
    + [getattr(Tensor, name) for name in _METHODS]
    + [torch.numel, torch.is_floating_point, torch.is_complex]
)
"""Questions that are answered without the weight: its form, and its place in the graph."""

_KEPT_BY_TORCH = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""The attributes in which torch keeps the hooks of a tensor."""

_WRITES: dict[Any, str] = {
    Tensor.__setitem__: "item assignment",
    Tensor.data.__get__: "data",  # type: ignore[attr-defined]
}
"""Functions that write on a tensor, or lend it to be written on, and don't end in an underscore."""


# A refusal is a TypeError. Torch's own operators take that for a type that they don't know, and go
# on to the other operand. These operators let the refusal through.
def _operator(name: str) -> Callable[[Any, Any], Any]:
    @not_compiled
    def operate(self: LazyWeight, other: Any) -> Any:
        return getattr(_differentiable(self), name)(_used(other, _differentiable))

    return operate


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    def refuse(self: LazyWeight, other: Any) -> Any:
        raise _read_only(self, name)

    return refuse


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_BITS = ("lshift", "rshift", "and", "or", "xor")
for _name in (*_ARITHMETIC, *_BITS):
    for _kind in ("", "r"):
        setattr(LazyWeight, f"__{_kind}{_name}__", _operator(f"__{_kind}{_name}__"))
    setattr(LazyWeight, f"__i{_name}__", _in_place(f"__i{_name}__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(LazyWeight, f"__{_name}__", _operator(f"__{_name}__"))
LazyWeight.__hash__ = Tensor.__hash__  # type: ignore[method-assign]


def _refuse_writes(name: str, args: Sequence[Any], named: dict[str, Any]) -> None:
    """Refuse what would write on an adapted weight.

    Raises:
        UnsupportedError: with its path.
    """
    out = named.get("out")
    written = list(out) if isinstance(out, (tuple, list)) else [out]
    if name in _WRITES.values() or (name.endswith("_") and not name.endswith("__")):
        written += [*args[:1], named.get("tensor"), named.get("input")]
    for value in written:
        if type(value) is LazyWeight:
            raise _read_only(value, name)


def _read_only(value: LazyWeight, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{value._recipe.path!r} is the weight with an adapter in, made when it is read, so "
        f"{name!r} would be lost or go round the adapter; "
        "the stored one is in named_parameters() and state_dict(). If it is the model's own code "
        "that writes on it, leave the layer out with exclude_names"
    )


def _used(value: Any, tensor: Callable[[LazyWeight], Tensor]) -> Any:
    """Arguments in which every adapted weight is replaced by what `tensor` makes of it."""
    if type(value) is LazyWeight:
        return tensor(value)
    if type(value) in (list, tuple):
        return type(value)(_used(v, tensor) for v in value)
    if type(value) is dict:
        return {k: _used(v, tensor) for k, v in value.items()}
    return value


# --------------------------------------------------------------------------------------- its values
def _differentiable(weight: LazyWeight) -> Tensor:
    """The weight itself for an operation in Python, in the graph of whatever follows it."""
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return _values(weight)
    with _at_level_0():
        made: Tensor = _Used.apply(weight)
    return made


def _values(weight: LazyWeight) -> Tensor:
    """The weight itself, without a graph.

    It is made once as long as the tensors that it is made of stay as they are. Where something sees
    each operation, it is made each time: a checkpoint that keeps some operations must find in the
    second run the operations of the first.
    """
    recipe = weight._recipe
    versions = _versions(recipe.tensors)
    keeps = not is_watched() and -1 not in versions
    if keeps and weight._made is not None and weight._made[0] == versions:
        return weight._made[1]
    with torch.inference_mode(False), torch.no_grad(), _at_level_0():
        made = recipe.make(*recipe.tensors).contiguous()
    if keeps:
        object.__setattr__(weight, "_made", (versions, made))
    return made


class _Read(torch.autograd.Function):
    """The adapted weight as a node of the graph: nothing is computed before the backward pass.

    It keeps the tensors that the weight is made of itself. Several backward passes may come through
    it, one for each block that is run again (reentrant checkpointing), and each must find them.
    """

    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, stored: Tensor, *tensors: Tensor) -> Tensor:
        ctx.recipe, ctx.versions = recipe, _versions(tensors)
        return LazyWeight(recipe, stored)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        recipe: _Recipe = ctx.recipe
        needed = ctx.needs_input_grad[2:]
        if _versions(recipe.tensors) != ctx.versions:
            raise RuntimeError(
                f"what {recipe.path!r} is made of (its adapter or its base) was modified by an "
                "inplace operation after the weight was read; take the step after the backward "
                "pass"
            )
        learned = [t for t, wanted in zip(recipe.tensors, needed, strict=True) if wanted]

        def again(*learned: Tensor) -> Tensor:
            these = iter(learned)
            return recipe.make(
                *(
                    next(these) if wanted else t
                    for t, wanted in zip(recipe.tensors, needed, strict=True)
                )
            )

        # torch.func.vjp composes with another derivative.
        with without_saved_hooks():
            pulled: Any = torch.func.vjp(again, *learned)
        back = iter(pulled[1](g))
        return None, None, *(next(back) if wanted else None for wanted in needed)


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each tensor was written on; -1 where that isn't counted (inference tensors)."""
    return tuple(-1 if t.is_inference() else t._version for t in tensors)


class _Used(torch.autograd.Function):
    """The values of an adapted weight; the gradient of the values is the weight's."""

    @staticmethod
    def forward(ctx: Any, weight: LazyWeight) -> Tensor:
        return _values(weight).detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g
