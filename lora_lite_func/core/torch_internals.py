"""The private names of torch that this library uses, each behind what it means, with a fallback.

Questions about a call (is it traced, transformed, watched?) are answered for the calling thread
alone: what another thread compiles or exports at the same time doesn't count. A fallback, for a
torch that lacks the name, gives the same answer, if more slowly; where none can, it gives the
answer that leads to the slower of two right ways.

`torch.utils._pytree` is used where it is needed: torch.func and torch.export go through it, so
nothing else could stand in for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
import torch.utils._python_dispatch as python_dispatch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

__all__ = [
    "BATCH_NORMS",
    "CALLS_SHARDED",
    "CALL_HOOKS",
    "CONVOLUTIONS",
    "HOOK_WRAPPERS",
    "INSTANCE_NORMS",
    "RUNNING_NORMS",
    "STATE_HOOKS",
    "TRACES_IDS",
    "at_trace_time",
    "attributes_of",
    "autocasts",
    "batched_dims",
    "copy_attributes",
    "copy_each",
    "draws_differ",
    "first_of",
    "flatten_again",
    "fused_adamw",
    "is_compiled",
    "is_differentiated",
    "is_followed",
    "is_jagged",
    "is_recorded",
    "is_sharded",
    "is_traced",
    "is_tracing_here",
    "is_transformed",
    "is_watched",
    "is_wrapped",
    "is_wrapper",
    "makes_graph",
    "may_overwrite",
    "not_compiled",
    "outside_transforms",
    "own_attributes",
    "paired",
    "parameter_of",
    "parameters_of",
    "plain_tensors",
    "plain_values",
    "shares_memory",
    "surroundings",
    "tensor_without_values",
    "with_class",
    "with_notes",
    "without_autocast",
    "without_class",
    "without_saved_hooks",
    "writes_on",
]

T = TypeVar("T")
D = TypeVar("D")

TRACES_IDS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
"""Whether torch.compile can trace `id` of a list or dict."""

CALLS_SHARDED = TRACES_IDS
"""Whether calls on weights shared out over processes were found right: on 2.8 some weren't."""

_levels: Any = getattr(torch._C, "_functorch", None)
"""The interpreters of torch.func's transforms, and the tensors that they wrap."""


# ---------------------------------------------------------------------------------------- autocast
def autocasts(device: str) -> bool:
    """Whether the caller's autocast reaches a type of device."""
    return device != "meta" and torch.is_autocast_enabled(device)


_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")


def _autocasts_anywhere() -> bool:
    return any(map(torch.is_autocast_enabled, _DEVICES))


_any_autocast: Callable[[], bool] = getattr(
    torch._C, "_is_any_autocast_enabled", _autocasts_anywhere
)


def without_autocast(device: str, function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` gives outside of the caller's autocast for that type of device.

    It is meant for what depends on parameters alone, in their own dtype: small systems can't be
    solved in the one that autocast would choose.
    """
    if device == "meta" or not torch.is_autocast_enabled(device):
        return function(*args)
    with torch.autocast(device, enabled=False):
        return function(*args)


# ----------------------------------------------------------------------------------------- tracing
def at_trace_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile call `function` while it traces and take the result as a constant.

    What `torch.compiler.assume_constant_result` does, without importing the compiler (a second and
    a half). A torch that doesn't know the mark traces the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable`, without importing the compiler where nobody has done so yet."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


def first_of(items: Iterable[T], default: D) -> T | D:
    """`next(iter(items), default)`, which the compiler of torch 2.8 can't trace."""
    for item in items:
        return item
    return default


def paired(names: Sequence[T], values: Sequence[D]) -> list[tuple[T, D]]:
    """Names and values, as far as both go: the compiler of torch 2.8 takes every zip for a strict
    one.
    """
    count = min(len(names), len(values))
    return list(zip(names[:count], values[:count], strict=True))


def is_tracing_here() -> bool:
    """Whether this thread records the call for other values than these: by torch.compile, by
    torch.export (strict or not) or by make_fx, or runs it on fake tensors.

    `torch.compiler.is_compiling()` says that of all threads while any of them compiles or exports.
    Under torch.compile this is the constant True because the call is traced.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return is_watched() and _records()


def _modes_of_tracing() -> bool:
    return any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)


def _signs_of_tracing() -> bool:
    # where the modes can't be asked for: fake and functional ones show in what a factory makes
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    proxies = tracer is not None and getattr(tracer, "get_proxy_mode", lambda: None)() is not None
    return proxies or type(torch.empty(0)) is not Tensor


_keys = getattr(torch._C, "_TorchDispatchModeKey", None)
_TRACERS = tuple(
    getattr(_keys, name) for name in ("FAKE", "PROXY", "FUNCTIONAL") if hasattr(_keys, name)
)
_records: Callable[[], bool] = (
    _modes_of_tracing
    if len(_TRACERS) == 3 and hasattr(torch._C, "_get_dispatch_mode")
    else _signs_of_tracing
)


def is_traced() -> bool:
    """Whether torch.jit.trace records the call, for inputs of other sizes and for calls with and
    without a graph.
    """
    return torch.jit.is_tracing()


def is_compiled(cls: type) -> bool:
    """Whether modules of a class are what torch.compile gave; without importing the compiler."""
    return any(base.__module__ == "torch._dynamo.eval_frame" for base in cls.__mro__)


# ------------------------------------------------------------------------------------- who watches
def _count_modes() -> int:
    stack = getattr(python_dispatch, "_get_current_dispatch_mode_stack", None)
    return 1 if stack is None else len(stack())  # unknown: the way for a watched call is right, too


_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", _count_modes)


def is_watched() -> bool:
    """Whether something sees each operation, in this thread.

    A graph that is made of them must have no number that was drawn, and a checkpoint that keeps
    some of them nothing that is written in place later.
    """
    return _modes() > 0


# -------------------------------------------------------------------------------------- transforms
def _innermost() -> Any:
    stack = _levels.get_interpreter_stack()
    return stack[-1] if stack else None


_transform: Callable[[], Any] = getattr(_levels, "peek_interpreter_stack", _innermost)
_GRAD = getattr(getattr(_levels, "TransformType", None), "Grad", None)


def is_transformed() -> bool:
    """Whether a transform of torch.func has a part in the call."""
    return _transform() is not None


def is_differentiated() -> bool:
    """Whether forward-mode derivatives are taken outside of torch.func (a dual level)."""
    try:
        return forward_ad._current_level >= 0
    except AttributeError:
        return _is_in_dual_level()


def _is_in_dual_level() -> bool:
    try:
        with forward_ad.dual_level():  # dual levels can't be nested
            return False
    except RuntimeError:
        return True


def is_recorded(tree: Any) -> bool:
    """Whether what is computed from a tree's tensors has to be made of operations that a transform,
    a compiler or a graph can follow.
    """
    if is_tracing_here() or is_transformed() or is_differentiated():
        return True
    return torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in torch_pytree.tree_leaves(tree)
    )


def surroundings() -> Literal["eager", "grad"] | None:
    """What surrounds an eager call: "eager", nothing; "grad", one torch.func.grad or vjp.

    None where anything else takes part: batches, tangents, nested transforms, tracing, autocast.
    """
    inner = _transform()
    if inner is not None and (inner.level() != 1 or inner.key() != _GRAD):
        return None
    if is_differentiated() or _any_autocast() or torch.jit.is_tracing():
        return None
    return "eager" if inner is None else "grad"


def makes_graph() -> bool:
    """Whether what is computed may be differentiated later, and nothing else is to be served by
    it.
    """
    return torch.is_grad_enabled() and not is_traced()


def may_overwrite(gradient: Tensor | None = None) -> bool:
    """Whether a tensor made here may be written over in place: no graph has it, and no transform or
    compiler has a part in it.

    Args:
        gradient: in a backward pass what came in, which may be several at once
            (`is_grads_batched`), of which no transform knows.
    """
    if torch.is_grad_enabled() or is_tracing_here() or surroundings() != "eager":
        return False
    return gradient is None or not _is_legacy_batch(gradient)


_is_legacy_batch: Callable[[Tensor], bool] = getattr(
    _levels, "is_legacy_batchedtensor", lambda t: True
)


_is_batched: Callable[[Tensor], bool] = getattr(
    _levels, "is_batchedtensor", lambda t: is_transformed()
)
_is_tracked: Callable[[Tensor], bool] = getattr(
    _levels, "is_gradtrackingtensor", lambda t: is_transformed()
)


def is_followed(t: Tensor) -> bool:
    """Whether torch.func.grad, vjp or jvp follows the tensor, at any level."""
    return any(map(_is_tracked, _layers(t)))


def is_wrapped(t: Tensor) -> bool:
    """Whether a tensor belongs to a level of torch.func's transforms."""
    return _is_wrapped(t)


_is_wrapped: Callable[[Tensor], bool] = getattr(
    _levels, "is_functorch_wrapped_tensor", lambda t: is_transformed()
)


def draws_differ(drawn: Tensor) -> bool:
    """Whether a number drawn here differs among the members of a vmap
    (`randomness="different"`).
    """
    return any(map(_is_batched, _layers(drawn)))


def _layers(t: Tensor) -> Iterator[Tensor]:
    """A tensor as each transform around the call has it, the innermost first."""
    yield t
    inner = getattr(_levels, "get_unwrapped", None)
    while inner is not None and _is_wrapped(t):
        t = inner(t)
        yield t


def plain_values(t: Tensor) -> Tensor | None:
    """The tensor beneath all levels of torch.func's transforms; None where a vmap maps over it."""
    layers = list(_layers(t))
    return None if any(map(_is_batched, layers)) else layers[-1]


@contextlib.contextmanager
def outside_transforms() -> Iterator[None]:
    """Operations on plain tensors that no transform around the call sees: what they make is of no
    transform, and they may draw from a generator of their own.
    """
    with _without_levels(), _without_legacy_vmap():
        yield


@contextlib.contextmanager
def _popped_levels() -> Iterator[None]:
    popped = []
    try:
        while is_transformed():
            popped.append(_levels.pop_dynamic_layer_stack())
        yield
    finally:
        for level in reversed(popped):
            _levels.push_dynamic_layer_stack(level)


try:
    from torch._functorch.pyfunctorch import (
        temporarily_clear_interpreter_stack as _without_levels,
    )
except ImportError:
    _without_levels = _popped_levels  # type: ignore[assignment]


_graph: Any = getattr(torch._C, "_autograd", None)
_top_hooks: Callable[[], Any] = (
    functools.partial(_graph._top_saved_tensors_default_hooks, True)
    if hasattr(_graph, "_top_saved_tensors_default_hooks")
    else lambda: None
)


@contextlib.contextmanager
def without_saved_hooks() -> Iterator[None]:
    """Operations of which no hook sees what autograd saves, as torch.func demands: those of a
    backward pass that runs within such hooks (offloading of activations, a checkpoint around it).
    """
    popped = []
    try:
        while (hooks := _top_hooks()) is not None:
            popped.append(hooks)
            _graph._pop_saved_tensors_default_hooks()
        yield
    finally:
        for pack, unpack in reversed(popped):
            _graph._push_saved_tensors_default_hooks(pack, unpack)


def _legacy_vmap_guard() -> Callable[[], AbstractContextManager[Any]]:
    """What keeps vmap over gradients (`is_grads_batched`) out: it forbids every draw."""
    try:
        key = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("VmapMode"))
        guard = torch._C._ExcludeDispatchKeyGuard
    except AttributeError:
        return contextlib.nullcontext
    return lambda: guard(key)


_without_legacy_vmap = _legacy_vmap_guard()


# ----------------------------------------------------------------------------------------- tensors
def is_wrapper(t: Any) -> bool:
    """Whether a tensor is of a subclass that holds others (torchao's, DTensor)."""
    return bool(_is_wrapper(t))


def without_class(t: Tensor) -> Tensor:
    """A tensor as a plain one, on the same memory, where its class adds no more than a name and
    attributes.
    """
    kind = type(t)
    if kind is Tensor or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return t
    with plain_tensors():
        return t.as_subclass(Tensor)


def with_class(t: Tensor, of: Tensor) -> Tensor:
    """A tensor, in its graph, of the class of another and with the same attributes, where those add
    no more than a name and attributes.
    """
    if torch.compiler.is_dynamo_compiling():
        return t
    kind = type(of)
    if kind in (Tensor, nn.Parameter):
        return with_notes(t, of)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return t
    return with_notes(t.as_subclass(kind), of)


def with_notes(t: Tensor, of: Tensor) -> Tensor:
    """`t` with the attributes that somebody has set on another tensor."""
    if not torch.compiler.is_dynamo_compiling() and of.__dict__:
        t.__dict__.update(of.__dict__)
    return t


def is_sharded(t: Any) -> bool:
    """Whether a tensor is shared out over processes (DTensor)."""
    # Whoever has a DTensor has imported this.
    dtensor: Any = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(t, dtensor.DTensor)


def _flattens(t: Any) -> bool:
    return hasattr(t, "__tensor_flatten__") and hasattr(t, "__tensor_unflatten__")


_is_wrapper: Callable[[Any], bool] = getattr(
    python_dispatch, "is_traceable_wrapper_subclass", _flattens
)


plain_tensors: Callable[[], AbstractContextManager[Any]] = getattr(
    torch._C, "DisableTorchFunctionSubclass", torch._C.DisableTorchFunction
)
"""Within it a function treats a subclass of Tensor as a tensor: no `__torch_function__` is asked.
"""


def tensor_without_values(cls: type[Tensor], like: Tensor) -> Any:
    """A contiguous tensor of a subclass with the shape, dtype and device of another, and no memory.

    Operations on it end in the subclass's `__torch_dispatch__`.
    """
    return _without_values(cls, like.size(), dtype=like.dtype, device=like.device)


def _empty_of(cls: type[Tensor], size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device).as_subclass(cls)


_without_values: Callable[..., Any] = getattr(Tensor, "_make_wrapper_subclass", _empty_of)


def is_jagged(x: Any) -> bool:
    """Whether a tensor is jagged and contiguous, with its lengths behind the first dimension."""
    return x.layout is torch.jagged and x.is_contiguous() and getattr(x, "_ragged_idx", 1) == 1


def _as_parameter(cls: type[Tensor], t: Tensor, requires_grad: bool) -> Tensor:
    return t.as_subclass(cls).requires_grad_(requires_grad)


parameter_of: Callable[[type[Any], Tensor, bool], Tensor] = getattr(
    Tensor, "_make_subclass", _as_parameter
)
"""(class of parameters, tensor, whether it requires a gradient) -> a parameter on its storage."""


def writes_on(func: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operator of torch writes on, out of what `__torch_dispatch__` gets."""
    schema = getattr(func, "_schema", None)
    if schema is None:  # without a schema, the name decides
        name = str(func).split(".")[1] if "." in str(func) else str(func)
        return [*args[:1], *named.values()] if name.endswith("_") else [named.get("out")]
    written = {
        (i, argument.name)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    found = [args[i] if i < len(args) else named.get(name) for i, name in written]
    return [t for value in found for t in (value if isinstance(value, (list, tuple)) else [value])]


def _copy_one_by_one(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for place, t in zip(to, values, strict=True):
        place.copy_(t)


copy_each: Callable[[list[Tensor], list[Tensor]], None] = getattr(
    torch, "_foreach_copy_", _copy_one_by_one
)
"""Copies each of several tensors onto another one of its shape."""

_storage_uses: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def shares_memory(t: Tensor) -> bool:
    """Whether another tensor may hold the memory of this one: a view, an alias, what a graph saved.

    Where torch doesn't say, it is always true.
    """
    if _storage_uses is None:
        return True
    storage = t.untyped_storage()  # the tensor's own hold on it, and this one
    return _storage_uses(storage._cdata) > 2


# ----------------------------------------------------------------------------------------- modules
_BASE = tuple(vars(nn.Module()))
_BASE_NAMES = frozenset(_BASE)

STATE_HOOKS = tuple(name for name in _BASE if name.endswith("_hooks") and "state_dict" in name)
"""The attributes in which a module keeps hooks on its state dict: no call installs them."""

CALL_HOOKS = tuple(
    name
    for name, value in vars(nn.Module()).items()
    if name.startswith(("_forward", "_backward")) and isinstance(value, OrderedDict)
)
"""The attributes in which a module keeps hooks on its calls."""

_hook_wrapper = getattr(nn.modules.module, "_WrappedHook", None)
HOOK_WRAPPERS: tuple[type, ...] = () if _hook_wrapper is None else (_hook_wrapper,)
"""The classes in which a module keeps a hook with the module that it is for."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS: Any = getattr(nn.modules.conv, "_ConvNd", (*_CONVOLUTIONS, *_TRANSPOSED))
"""What every convolution of torch is an instance of, for isinstance."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
BATCH_NORMS: Any = getattr(nn.modules.batchnorm, "_BatchNorm", _BATCH_NORMS)
"""What every batch norm of torch is an instance of."""

INSTANCE_NORMS: Any = getattr(nn.modules.instancenorm, "_InstanceNorm", _INSTANCE_NORMS)
"""What every instance norm of torch is an instance of."""

RUNNING_NORMS: Any = getattr(nn.modules.batchnorm, "_NormBase", (*_BATCH_NORMS, *_INSTANCE_NORMS))
"""What every norm of torch with running statistics is an instance of."""


def batched_dims(norm: Any) -> int:
    """How many dimensions an instance norm's input has in a batch; 0 where that isn't known."""
    unbatched = getattr(norm, "_get_no_batch_dim", None)
    if unbatched is not None:
        return int(unbatched()) + 1
    dims = zip(_INSTANCE_NORMS, (3, 4, 5), strict=True)
    return next((count for cls, count in dims if isinstance(norm, cls)), 0)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """A module's `__dict__`, to be gone through.

    Compilers of torch before 2.9 or so can look up a name in one and set it, but not go through it:
    there it is a dict of the same values, by names that are constants of the graph.
    """
    if not torch.compiler.is_dynamo_compiling() or _compiler_goes_through():
        return module.__dict__
    attributes = module.__dict__
    names = attributes[_NAMES] if _NAMES in attributes else _names_at(id(module))
    return {name: attributes[name] for name in (*names, *_OURS) if name in attributes}


def copy_attributes(module: nn.Module, made: nn.Module) -> None:
    """Give a new module the attributes of another."""
    if not torch.compiler.is_dynamo_compiling() or _compiler_goes_through():
        made.__dict__.update(module.__dict__)
        return
    found, attributes = attributes_of(module), made.__dict__
    for name, value in found.items():
        attributes[name] = value
    attributes[_NAMES] = tuple(found)  # a module that is made in a graph has no id


_NAMES = "_ll_names"
_OURS = ("_ll", "_ll_bound", "_ll_prompt", "_ll_forward", "forward")


@at_trace_time
def _compiler_goes_through() -> bool:
    return hasattr(sys.modules["torch._dynamo.variables"], "DunderDictVariable")


@at_trace_time
def _names_at(address: int) -> tuple[str, ...]:
    module = ctypes.cast(address, ctypes.py_object).value
    return tuple(name for name in module.__dict__ if name != "_compiled_call_impl")


def own_attributes(module: nn.Module) -> Iterable[tuple[str, Any]]:
    """Of a module's attributes those that nn.Module didn't put there."""
    if torch.compiler.is_dynamo_compiling():
        held = attributes_of(module)
        return [(name, value) for name, value in held.items() if name not in _BASE]
    attributes = module.__dict__
    if tuple(attributes)[: len(_BASE)] == _BASE:  # cheaper than to ask for each name
        return () if len(attributes) == len(_BASE) else islice(attributes.items(), len(_BASE), None)
    return ((name, value) for name, value in attributes.items() if name not in _BASE_NAMES)


def parameters_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own parameters; of a replica that torch.nn.DataParallel made, which has none, the
    tensors that stand for them.
    """
    stand_ins: dict[str, Tensor | None] | None = module.__dict__.get("_former_parameters")
    own: Any = module._parameters
    return {**own, **stand_ins} if stand_ins else own


def flatten_again(module: Any) -> None:
    """A recurrent layer's flat list of its tensors, as they are now."""
    attributes = module.__dict__
    if "_flat_weights" in attributes and "_flat_weights_names" in attributes:
        flat = [attributes["_parameters"].get(name) for name in attributes["_flat_weights_names"]]
        attributes["_flat_weights"] = flat
        attributes["_flat_weight_refs"] = [None if p is None else weakref.ref(p) for p in flat]


# -------------------------------------------------------------------------------------- optimizers
_fused_adamw: Callable[..., None] | None = getattr(torch, "_fused_adamw_", None)


def fused_adamw(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> bool:
    """AdamW on one tensor in place (p, and its running means m and v), by torch's fused kernel.

    False, with nothing written, where there is no such kernel for these tensors.
    """
    tensors = (p, g, m, v)
    known = p.device.type in ("cpu", "cuda") and p.is_floating_point() and p.itemsize > 1
    alike = all(t.dtype == p.dtype and t.device == p.device for t in tensors)
    if _fused_adamw is None or not known or not alike or not p.numel():
        return False
    if not all(type(t) is Tensor and t.is_contiguous() for t in tensors):
        return False
    _fused_adamw(
        [p],
        [g],
        [m],
        [v],
        [],
        [step],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    return True
