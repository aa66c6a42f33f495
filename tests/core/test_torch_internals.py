"""Each private name of torch means what it is taken to mean.

Without the name the fallback gives the same answer.
"""

from __future__ import annotations

import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lite_func.core import torch_internals

HIDDEN: dict[str, list[tuple[Any, str]]] = {
    "as torch is": [],
    "no peek at the interpreters": [(torch._C._functorch, "peek_interpreter_stack")],
    "no dual level": [(forward_ad, "_current_level")],
    "no question for autocast": [(torch._C, "_is_any_autocast_enabled")],
    "no modes by key": [(torch._C, "_get_dispatch_mode")],
    "no keys of modes": [(torch._C, "_TorchDispatchModeKey")],
    "no count of modes": [(torch._C, "_len_torch_dispatch_stack")],
    "no flattening of subclasses": [
        (torch.utils._python_dispatch, "is_traceable_wrapper_subclass")
    ],
    "no clearing of interpreters": [
        (torch._functorch.pyfunctorch, "temporarily_clear_interpreter_stack")
    ],
    "no bases of layers": [
        (nn.modules.conv, "_ConvNd"),
        (nn.modules.batchnorm, "_BatchNorm"),
        (nn.modules.batchnorm, "_NormBase"),
    ],
}
"""What is taken away from torch before the file is imported once more."""


@pytest.fixture(params=HIDDEN)
def internals(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file, made for a torch that lacks some names, which are back when the test begins."""
    with monkeypatch.context() as hiding:
        for owner, name in HIDDEN[request.param]:
            hiding.delattr(owner, name)
        spec = importlib.util.spec_from_file_location("again", torch_internals.__file__)
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
    if request.param == "no dual level":  # asked for in each call
        monkeypatch.setattr(made, "forward_ad", _without_level())
    return made


def _without_level() -> Any:
    class Public:
        dual_level = forward_ad.dual_level

    return Public


class Watching(TorchDispatchMode):
    """Sees each operation and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def in_grad(ask: Callable[[Tensor], Any]) -> list[Any]:
    """Answers where torch.func.grad differentiates in t."""
    found: list[Any] = []
    torch.func.grad(lambda t: (found.append(ask(t)), t.sum())[1])(torch.ones(2))
    return found


def in_vmap(ask: Callable[[Tensor], Any]) -> list[Any]:
    """Answers where t is a member of a batch."""
    found: list[Any] = []
    torch.func.vmap(lambda t: (found.append(ask(t)), t)[1])(torch.ones(2, 2))
    return found


def in_both(ask: Callable[[Tensor], Any]) -> list[Any]:
    """Answers where t is differentiated for each member of a batch."""
    found: list[Any] = []
    inner = torch.func.grad(lambda t: (found.append(ask(t)), t.sum())[1])
    torch.func.vmap(inner)(torch.ones(2, 2))
    return found


def in_jvp(ask: Callable[[Tensor], Any]) -> list[Any]:
    """Answers where torch.func.jvp follows t."""
    found: list[Any] = []
    ones = torch.ones(2)
    torch.func.jvp(lambda t: (found.append(ask(t)), t)[1], (ones,), (ones,))
    return found


def test_transforms(internals: ModuleType) -> None:
    plain = torch.ones(2)
    ask = internals.is_transformed
    assert not ask()
    for within in (in_grad, in_vmap, in_both, in_jvp):
        assert within(lambda t: ask()) == [True]
    assert not ask()
    assert not internals.is_followed(plain)
    for within, followed in ((in_grad, True), (in_both, True), (in_jvp, True), (in_vmap, False)):
        assert within(internals.is_followed) == [followed]
    assert internals.plain_values(plain) is plain
    assert in_vmap(internals.plain_values) == in_both(internals.plain_values) == [None]
    (beneath,) = in_grad(internals.plain_values)
    assert beneath is not None
    assert not internals.is_wrapped(beneath)
    assert not internals.draws_differ(plain)
    assert in_both(internals.draws_differ) == [True]
    assert in_grad(internals.draws_differ) == [False]


def test_surroundings(internals: ModuleType) -> None:
    ask = internals.surroundings
    assert ask() == "eager"
    assert in_grad(lambda t: ask()) == ["grad"]
    for within in (in_vmap, in_both, in_jvp):
        assert within(lambda t: ask()) == [None]
    with forward_ad.dual_level():
        assert ask() is None
        assert internals.is_differentiated()
    assert not internals.is_differentiated()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ask() is None
        assert internals.autocasts("cpu")
    with torch.autocast("cpu", enabled=False):
        assert ask() == "eager"
    assert not internals.autocasts("meta")
    found = []
    torch.jit.trace(lambda t: (found.append(ask()), t + 1)[1], (torch.ones(2),), check_trace=False)
    assert found == [None]


def test_what_may_be_overwritten(internals: ModuleType) -> None:
    ask = internals.may_overwrite
    assert not ask()
    with torch.no_grad():
        assert ask()
        assert ask(torch.ones(2))
        assert in_vmap(lambda t: ask()) == [False]
        with FakeTensorMode():
            assert not ask()
    came: list[bool] = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            came.append(ask(g))
            return 2 * g

    x = torch.ones(2, requires_grad=True)
    Twice.apply(x).sum().backward()
    torch.autograd.grad(Twice.apply(x), x, torch.eye(2), is_grads_batched=True)
    assert came == [True, False]


def modes() -> dict[str, Any]:
    """What may be active around a call, and whether it records the call for other values."""
    return {
        "nothing": (nullcontext, False),
        "a mode that watches": (Watching, False),
        "fake tensors": (FakeTensorMode, True),
        "a device": (lambda: torch.device("cpu"), False),
    }


@pytest.mark.parametrize("name", modes())
def test_tracing_by_modes(internals: ModuleType, name: str) -> None:
    make, records = modes()[name]
    with make():
        assert internals.is_tracing_here() is records
        assert internals.is_watched() is (name not in ("nothing", "a device"))
    assert not internals.is_watched()


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_is_tracing(internals: ModuleType, mode: Any) -> None:
    found = []

    def call(t: Tensor) -> Tensor:
        found.append((internals.is_tracing_here(), internals.is_watched()))
        return t + 1

    make_fx(call, tracing_mode=mode)(torch.ones(2))
    assert found == [(True, True)]


def test_export_without_dynamo_is_tracing(internals: ModuleType) -> None:
    found: list[bool] = []

    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found.append(internals.is_tracing_here())
            return x + 1

    torch.export.export(Asking(), (torch.ones(2),), strict=False)
    assert set(found) == {True}


def test_a_compiled_call_takes_it_for_a_constant() -> None:
    ask = torch_internals.is_tracing_here
    step: Any = torch.compile(lambda x: x + 1 if ask() else x - 1, backend="eager", fullgraph=True)
    assert step(torch.ones(2)).tolist() == [2.0, 2.0]
    assert not ask()
    torch._dynamo.reset()


def test_what_runs_in_python_after_a_graph_break_is_not_traced() -> None:
    found = []

    def note() -> None:
        found.append(torch_internals.is_tracing_here())

    def call(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        torch.compiler.disable(note)()
        return x * 2

    torch.compile(call, backend="eager")(torch.ones(2))
    assert found == [False]
    torch._dynamo.reset()


@contextmanager
def compiling_elsewhere() -> Iterator[None]:
    """While the block runs, another thread is in the midst of a compilation."""
    begun, done = threading.Event(), threading.Event()

    def backend(graph: Any, inputs: Any) -> Any:
        begun.set()
        assert done.wait(60)
        return graph

    def compile() -> None:
        torch.compile(lambda t: t.sin(), backend=backend)(torch.ones(3))

    other = threading.Thread(target=compile)
    other.start()
    try:
        assert begun.wait(60)
        yield
    finally:
        done.set()
        other.join()
        torch._dynamo.reset()


@contextmanager
def exporting_elsewhere() -> Iterator[None]:
    """While the block runs, another thread is in the midst of an export."""
    begun, done = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            begun.set()
            assert done.wait(60)
            return x + 1

    def export() -> None:
        torch.export.export(Waiting(), (torch.ones(2),), strict=False)

    other = threading.Thread(target=export)
    other.start()
    try:
        assert begun.wait(60)
        yield
    finally:
        done.set()
        other.join()


@pytest.mark.parametrize("elsewhere", [compiling_elsewhere, exporting_elsewhere])
def test_another_threads_tracing_does_not_count(
    internals: ModuleType, elsewhere: Callable[[], Any]
) -> None:
    with elsewhere():
        assert not internals.is_tracing_here()
        assert internals.surroundings() == "eager"
        with torch.no_grad():
            assert internals.may_overwrite()


def test_what_is_made_outside_of_transforms(internals: ModuleType) -> None:
    def draws(t: Tensor) -> list[Any]:
        with internals.outside_transforms():
            inside = internals.is_transformed()
            gen = torch.Generator().manual_seed(0)
            drawn = torch.empty(2).uniform_(generator=gen).tolist()
        return [inside, internals.is_transformed(), drawn]

    wanted = torch.empty(2).uniform_(generator=torch.Generator().manual_seed(0)).tolist()
    assert draws(torch.ones(2)) == [False, False, wanted]
    for within in (in_grad, in_vmap, in_both):
        assert within(draws) == [[False, True, wanted]]

    class Drawn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * torch.tensor(draws(g)[2])

    x = torch.ones(2, requires_grad=True)
    back = torch.autograd.grad(Drawn.apply(x), x, torch.eye(2), is_grads_batched=True)[0]
    assert back.diagonal().tolist() == pytest.approx(wanted)


def test_wrappers(internals: ModuleType) -> None:
    plain = torch.ones(2)
    assert internals.is_wrapper(TwoTensor(plain, plain))
    assert not internals.is_wrapper(plain)
    assert not internals.is_wrapper(nn.Parameter(plain))
    assert not internals.is_wrapper(None)


def test_layers(internals: ModuleType) -> None:
    for layer in (nn.Conv2d(2, 2, 1), nn.ConvTranspose1d(2, 2, 1)):
        assert isinstance(layer, internals.CONVOLUTIONS)
    for norm in (nn.BatchNorm1d(2), nn.SyncBatchNorm(2)):
        assert isinstance(norm, internals.BATCH_NORMS)
        assert isinstance(norm, internals.RUNNING_NORMS)
    assert isinstance(nn.InstanceNorm2d(2), internals.RUNNING_NORMS)
    assert isinstance(nn.InstanceNorm2d(2), internals.INSTANCE_NORMS)
    for other in (nn.LayerNorm(2), nn.Linear(2, 2)):
        assert not isinstance(
            other, (internals.CONVOLUTIONS, internals.BATCH_NORMS, internals.RUNNING_NORMS)
        )
    assert not internals.is_compiled(nn.Linear)
    assert internals.is_compiled(type(torch.compile(nn.Linear(2, 2))))


def test_hooks_are_kept_where_torch_keeps_them(internals: ModuleType) -> None:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: None)
    layer.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    layer.register_full_backward_hook(lambda *_: None)
    layer.register_full_backward_pre_hook(lambda *_: None)
    layer.register_state_dict_post_hook(lambda *_: None)
    layer.register_state_dict_pre_hook(lambda *_: None)
    layer.register_load_state_dict_pre_hook(lambda *_: None)
    layer.register_load_state_dict_post_hook(lambda *_: None)
    filled = {n for n, v in vars(layer).items() if isinstance(v, OrderedDict) and len(v)}
    assert filled <= {*internals.CALL_HOOKS, *internals.STATE_HOOKS}
    assert not set(internals.CALL_HOOKS) & set(internals.STATE_HOOKS)
    assert len(internals.STATE_HOOKS) == 4


@pytest.mark.parametrize("order", ["as made", "reordered", "put before", "one taken out"])
def test_own_attributes(internals: ModuleType, order: str) -> None:
    class Early(nn.Linear):
        def __init__(self) -> None:
            if order == "put before":
                object.__setattr__(self, "early", 3)
            super().__init__(2, 2)

    layer: Any = Early()
    layer.mine = "mine"
    if order == "reordered":
        layer.__dict__["training"] = layer.__dict__.pop("training")
    if order == "one taken out":
        del layer.__dict__["_is_full_backward_hook"]
    wanted = {"in_features": 2, "out_features": 2, "mine": "mine"}
    wanted |= {"early": 3} if order == "put before" else {}
    assert dict(internals.own_attributes(layer)) == wanted


@pytest.mark.parametrize("through", ["as torch is", "names alone"])
def test_a_compiled_call_copies_attributes(through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if through == "names alone":  # as compilers have it that can't go through a `__dict__`
        no = torch_internals.at_trace_time(lambda: False)
        monkeypatch.setattr(torch_internals, "_compiler_goes_through", no)
    torch._dynamo.reset()
    layer: Any = nn.Linear(2, 2)
    layer.factor = 3.0

    def copied(module: nn.Module) -> Any:
        made: Any = object.__new__(nn.Linear)
        torch_internals.copy_attributes(module, made)
        return made

    def call(x: Tensor) -> Tensor:
        made = copied(copied(layer))  # the second of one that is made in the graph
        names = [name for name, _ in torch_internals.own_attributes(made)]
        assert {"in_features", "out_features", "factor"} <= set(names)
        assert "training" not in names
        found = torch_internals.attributes_of(made)
        return made.forward(x) * found["factor"]

    x = torch.ones(3, 2)
    compiled: Any = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), call(x))
    assert torch.equal(compiled(x), 3.0 * layer(x))
    assert not [name for name in vars(layer) if name.startswith("_ll")]
    torch._dynamo.reset()


def test_parameters_of_a_replica(internals: ModuleType) -> None:
    layer = nn.Linear(2, 2)
    assert internals.parameters_of(layer) is layer._parameters
    replica = layer._replicate_for_data_parallel()
    replica._former_parameters = {}  # as torch.nn.parallel.replicate goes on
    for name in layer._parameters:
        replica._parameters[name] = None
        replica._former_parameters[name] = layer._parameters[name]
    assert internals.parameters_of(replica) == layer._parameters


def test_a_recurrent_layers_flat_list_follows_its_parameters(internals: ModuleType) -> None:
    layer = nn.GRU(2, 2)
    new = {
        name: nn.Parameter(p.detach() + 1) for name, p in layer._parameters.items() if p is not None
    }
    layer._parameters.update(new)
    internals.flatten_again(layer)
    assert all(a is b for a, b in zip(layer._flat_weights, new.values(), strict=True))
    assert [ref() for ref in layer._flat_weight_refs] == list(new.values())
    internals.flatten_again(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("norm", "dims"),
    [(nn.InstanceNorm1d(4), 3), (nn.InstanceNorm2d(4), 4), (nn.InstanceNorm3d(4), 5)],
    ids=str,
)
def test_dimensions_of_an_instance_norms_batch(
    internals: ModuleType, norm: nn.Module, dims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert internals.batched_dims(norm) == dims
    monkeypatch.delattr(type(norm), "_get_no_batch_dim")
    monkeypatch.delattr(nn.modules.instancenorm._InstanceNorm, "_get_no_batch_dim")
    assert internals.batched_dims(norm) == dims


def test_a_parameter_of_a_class_of_its_own() -> None:
    class Special(nn.Parameter):
        pass

    t = torch.ones(2)
    for make in (torch_internals.parameter_of, torch_internals._as_parameter):
        for requires_grad in (True, False):
            made = make(Special, t, requires_grad)
            assert type(made) is Special
            assert made.requires_grad is requires_grad
            assert made.data_ptr() == t.data_ptr()
