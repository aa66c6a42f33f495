"""`ll.functional`: what `ll.apply` gives, by copies that serve again and never show it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from helpers import Checkpointed, close, in_threads, leaves, moved, net, same_state, snapshot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import jvp, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import lora_lite_func as ll
import lora_lite_func.api.functional as module_of_f


def x16(seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(4, 16, generator=gen, dtype=torch.float64)


def adapters(model: nn.Module, count: int = 3, **config: Any) -> list[ll.Adapter]:
    return [moved(ll.init(model, ll.LoRAConfig(r=2, **config)), seed) for seed in range(count)]


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each copy of a model that a call had to make."""
    made: list[int] = []
    make = vars(module_of_f)["kept_tree"]

    def counting(*args: Any) -> Any:
        made.append(1)
        return make(*args)

    monkeypatch.setattr(module_of_f, "kept_tree", counting)
    return made


def test_its_first_call_may_be_inside_any_transform() -> None:
    model = net()
    p = moved(ll.init(model, ll.LoRAConfig(r=2)))
    x, stack = x16(), ll.stack([p, p])

    def loss(f: Callable[..., Tensor]) -> Callable[[Any], Tensor]:
        return lambda p: f(p, x).square().mean()

    ways: dict[str, Callable[[Any], Any]] = {
        "grad": lambda c: torch.func.grad(c)(p),
        "jacrev": lambda c: torch.func.jacrev(c)(p),
        "jvp": lambda c: jvp(c, (p,), (p,)),
        "vmap": lambda c: vmap(c)(stack),
        "vmap of grad": lambda c: vmap(torch.func.grad(c))(stack),
        "grad of jvp": lambda c: torch.func.grad(lambda q: jvp(c, (q,), (p,))[1])(p),
    }
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        for name, way in ways.items():
            f = ll.functional(model, p)
            expected = way(loss(lambda p, x: ll.apply(model, p, x)))
            for _ in range(2):  # what the first call has left serves the second
                for a, b in zip(leaves(way(loss(f))), leaves(expected), strict=True):
                    assert (a - b).abs().max() < 1e-10, name
                close(f(p, x), ll.apply(model, p, x), 1e-12)


# --------------------------------------------------------------------------------- one copy for all
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_one_copy_serves_all_adapters(grad: bool, frozen: bool, copied: list[int]) -> None:
    model = net().requires_grad_(not frozen)
    several = adapters(model)
    f, before = ll.functional(model, several[0].layout), snapshot(model)
    with torch.set_grad_enabled(grad):
        for params in (*several, *several):
            assert torch.equal(f(params, x16()), ll.apply(model, params, x16()))
    assert len(copied) == 1
    assert same_state(before, snapshot(model))
    assert all(p.grad is None for p in model.parameters())


def test_a_copy_holds_no_adapter_and_no_model_longer_than_it_is_used() -> None:
    model = net()
    (params,) = adapters(model, 1)
    f = ll.functional(model, params)
    f(params, x16())
    gone = [weakref.ref(t) for t in leaves(params)]
    del params
    assert [r for r in gone if r() is not None] == []
    held = weakref.ref(model)
    del f, model
    gc.collect()
    assert held() is None


def test_layers_whose_weight_is_adapted(copied: list[int]) -> None:
    layers = (nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(20, 4))
    model = nn.Sequential(*layers).double().eval()
    several = [
        moved(ll.init(model, ll.LoRAConfig(r=2, target_kinds=("conv", "linear"))), seed)
        for seed in (1, 2)
    ]
    f, x = ll.functional(model, several[0]), torch.randn(2, 3, 5, dtype=torch.float64)
    for params in several * 2:
        assert torch.equal(f(params, x), ll.apply(model, params, x))
    attention = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64).eval()
    (params,) = adapters(attention, 1)
    g, x = ll.functional(attention, params), torch.randn(2, 5, 16, dtype=torch.float64)
    for _ in range(2):
        close(g(params, x, x, x)[0], ll.apply(attention, params, x, x, x)[0], 1e-12)
    assert len(copied) == 2


def test_what_apply_takes(copied: list[int]) -> None:
    model = net()
    p, q, r = adapters(model)
    other = moved(ll.init(model, ll.HRAConfig(r=2, target_names=("up",))))
    for params in ((p, other), {"style": p, "task": other}, [p], ()):
        f = ll.functional(model, params)
        for _ in range(2):
            assert torch.equal(f(params, x16()), ll.apply(model, params, x16()))
    f, stack = ll.functional(model, p), ll.stack([p, q, r])
    for ids in ([0, 2, -1, 1], [1, 1, 0, 2]):
        mixed = ll.rows(stack, ids)
        assert torch.equal(f(mixed, x16()), ll.apply(model, mixed, x16()))
    shares = ll.mixed(stack, torch.rand(4, 3, generator=torch.Generator().manual_seed(0)).double())
    assert torch.equal(f(shares, x16()), ll.apply(model, shares, x16()))
    wider = moved(ll.init(model, ll.LoRAConfig(r=4, alpha=3.0)))
    for params in (wider, ll.scale(p, 0.5), ll.stack([p, wider])[1]):
        assert torch.equal(f(params, x16()), ll.apply(model, params, x16()))
    assert len(copied) == 5


def test_adapters_of_bare_parameters_and_whole_modules() -> None:
    model = net()
    bare = moved(ll.init(model, ll.FullConfig(target_parameters=(r"up\.weight$",))))
    whole = moved(ll.init(model, ll.LoReFTConfig(r=2)))
    for params in (bare, whole):
        f = ll.functional(model, params)
        for _ in range(2):
            assert torch.equal(f(params, x16()), ll.apply(model, params, x16()))


# -------------------------------------------------------------------------------------- transforms
def test_transforms(copied: list[int]) -> None:
    model = net()
    p, q, r = adapters(model)
    f, x = ll.functional(model, p), x16()

    def loss(call: Callable[..., Tensor]) -> Callable[[Any], Tensor]:
        return lambda t: call(t).square().mean()

    ours, theirs = loss(lambda t: f(t, x)), loss(lambda t: ll.apply(model, t, x))
    stack, v = ll.stack([p, q, r]), pytree.tree_map(torch.ones_like, p)
    both: list[Callable[[Any], Any]] = [
        lambda c: vmap(c)(stack),
        lambda c: ll.grad(c)(p),
        lambda c: ll.value_and_grad(c)(q),
        lambda c: torch.func.grad(c)(r),
        lambda c: vmap(ll.grad(c))(stack),
        lambda c: jvp(torch.func.grad(c), (p,), (v,)),
        lambda c: torch.func.grad(lambda t: vmap(c)(ll.stack([t, q])).sum())(p),
    ]
    for _ in range(2):
        for use in both:
            close(leaves(use(ours)), leaves(use(theirs)), 1e-12)
    assert len(copied) <= 2  # a call outside of graphs has the weights themselves


def test_one_full_graph_serves_many_adapters() -> None:
    torch._dynamo.reset()
    model = net()
    counter = CompileCounter()
    several = [moved(ll.init(model, ll.LoRAConfig(r=2, alpha=a)), 3) for a in (1.0, 2.0, 5.0)]
    f = ll.functional(model, several[0])
    compiled: Any = torch.compile(f, backend=counter, fullgraph=True)
    for params in several:
        close(compiled(params, x16()), ll.apply(model, params, x16()), 1e-12)
    assert counter.frame_count == 1
    x = x16()
    step: Any = torch.compile(
        lambda p: ll.grad(lambda p: f(p, x).square().mean())(p),
        backend="eager",
        fullgraph=True,
    )
    close(
        leaves(step(several[1])),
        leaves(ll.grad(lambda p: ll.apply(model, p, x16()).square().mean())(several[1])),
        1e-12,
    )
    model.train()  # the compiler sees it, as for any model
    close(compiled(several[0], x16()), ll.apply(model, several[0], x16()), 1e-12)
    torch._dynamo.reset()


def test_a_recomputed_block_has_the_adapter_of_its_own_call(copied: list[int]) -> None:
    model = Checkpointed(net(depth=1))
    several = adapters(model)
    f = ll.functional(model, several[0])

    def live(params: ll.Adapter) -> Any:
        return pytree.tree_map(lambda t: t.detach().requires_grad_(), params)

    wanted = [
        torch.func.grad(lambda p: ll.apply(model.inner, p, x16()).square().mean())(
            ll.from_dict(
                {path.removeprefix("inner."): ts for path, ts in ll.to_dict(p).items()},
                ll.init(model.inner, ll.LoRAConfig(r=2)),
            )
        )
        for p in several
    ]
    for _ in range(2):
        given = [live(p) for p in several]
        losses = [f(p, x16()).square().mean() for p in given]  # all before the first is done
        for loss, params, expected in zip(losses, given, wanted, strict=True):
            close(torch.autograd.grad(loss, leaves(params)), leaves(expected), 1e-12)
    assert len(copied) == 6  # a copy that a graph still needs isn't used again


class Around(nn.Linear):
    """A layer that calls another one, in a checkpoint of its own."""

    def __init__(self) -> None:
        super().__init__(16, 16, dtype=torch.float64)
        self.inner = nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        other: Any = checkpoint(self.other, x, use_reentrant=False)
        return super().forward(x) + other

    def other(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def test_a_checkpoint_inside_of_a_layer() -> None:
    model = nn.Sequential(Around())
    several = adapters(model)
    assert set(several[0]) == {"0", "0.inner"}
    f = ll.functional(model, several[0])

    def gradients(call: Callable[..., Tensor]) -> list[Any]:
        given = [pytree.tree_map(lambda t: t.detach().requires_grad_(), p) for p in several]
        losses = [call(p, x16()).square().mean() for p in given]
        return [torch.autograd.grad(loss, leaves(p)) for loss, p in zip(losses, given, strict=True)]

    close(gradients(f), gradients(lambda p, x: ll.apply(model, p, x)), 1e-12)


# ------------------------------------------------------------------------------------------ threads
def test_threads_with_unlike_adapters_do_not_meet() -> None:
    model = net()
    several = adapters(model, 6)
    f = ll.functional(model, several[0])
    wanted = [ll.apply(model, p, x16()) for p in several]
    grads = [torch.func.grad(lambda p: ll.apply(model, p, x16()).sum())(p) for p in several]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            with torch.no_grad():
                if not torch.equal(f(several[i], x16()), wanted[i]):
                    wrong.append(i)
            found = ll.grad(lambda p: f(p, x16()).sum())(several[i])
            for a, b in zip(leaves(found), leaves(grads[i]), strict=True):
                if (a - b).abs().max() > 1e-12:
                    wrong.append(i)

    in_threads(6, work)
    assert not wrong


class Asking(nn.Module):
    """A model that calls what it is given, in the middle of its own call."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16, dtype=torch.float64)
        self.down = nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, x: Tensor, also: Callable[[], Tensor] | None = None) -> Tensor:
        h = torch.tanh(self.up(x))
        h = h if also is None else h + also()
        return self.down(h)


def test_calls_inside_one_another() -> None:
    model = Asking()
    p, q, _ = adapters(model)
    f = ll.functional(model, p)
    for _ in range(2):
        inner = ll.apply(model, q, x16())
        expected = ll.apply(model, p, x16(), lambda inner=inner: inner)
        assert torch.equal(f(p, x16(), lambda: f(q, x16())), expected)


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model = Asking()
    p, q, _ = adapters(model)
    f = ll.functional(model, p)

    def fail() -> Tensor:
        raise ValueError("in the middle")

    for _ in range(2):
        with pytest.raises(ValueError, match="in the middle"):
            f(p, x16(), fail)
        assert torch.equal(f(q, x16()), ll.apply(model, q, x16()))


# ------------------------------------------------------------------------ what a call leaves behind
class Noting(nn.Module):
    """Counts its calls, keeps what it saw, installs a hook while it runs, makes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net(depth=1)
        self.calls = 0
        self.seen: list[float] = []
        self.norm = nn.BatchNorm1d(8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(1.0)
        self.inner.head.register_forward_hook(lambda module, args, out: out * 2.0)
        self.register_buffer("mask", torch.ones(8, dtype=torch.float64), persistent=False)
        return self.norm(self.inner(x)) * self.calls + len(self.seen)


@pytest.mark.parametrize("train", [False, True])
def test_what_a_call_leaves_on_its_modules_is_not_there_in_the_next(train: bool) -> None:
    model = Noting().train(train)
    several = adapters(model)
    f, before = ll.functional(model, several[0]), snapshot(model)
    for params in several * 2:
        assert torch.equal(f(params, x16()), ll.apply(model, params, x16()))
    assert model.calls == 0
    assert model.seen == []
    assert same_state(before, snapshot(model))


# ----------------------------------------------------------------------------- a model that changes
def _head(model: Any) -> Any:
    return model.head


def _hooked(model: Any) -> None:
    model.layers[0].up.register_forward_hook(lambda module, args, out: out * 1.5)


def _given_forward(model: Any) -> None:
    old = model.layers[0].forward
    model.layers[0].forward = lambda x: old(x) * 2.0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "training": lambda m: m.train(),
    "float": lambda m: m.float(),
    "values in place": lambda m: _head(m).weight.data.mul_(2.0),
    "other values": lambda m: setattr(_head(m).weight, "data", _head(m).weight.data * 3.0),
    "a parameter": lambda m: setattr(
        m.layers[0].up, "weight", nn.Parameter(m.layers[0].up.weight.detach() * 2.0)
    ),
    "no bias": lambda m: setattr(m.layers[0].up, "bias", None),
    "a module": lambda m: setattr(m, "head", nn.Tanh()),
    "a site": lambda m: setattr(m.layers[0], "up", nn.Linear(16, 24, dtype=torch.float64)),
    "blocks swapped": lambda m: setattr(m, "layers", nn.ModuleList([m.layers[1], m.layers[0]])),
    "a block more": lambda m: m.layers.append(net(9).layers[0]),
    "a hook": _hooked,
    "a forward": _given_forward,
    "computed": lambda m: parametrizations.weight_norm(m.layers[1].down),
    "requires_grad": lambda m: m.requires_grad_(False),
    "a class": lambda m: setattr(_head(m), "__class__", type("Own", (nn.Linear,), {})),
    "state dict": lambda m: m.load_state_dict(net(5).state_dict()),
    "assigned": lambda m: m.load_state_dict(net(6).state_dict(), assign=True),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("grad", [False, True])
def test_a_call_sees_the_model_as_it_is(what: str, grad: bool) -> None:
    model = net()
    p, q, _ = adapters(model, dropout=0.5)
    f = ll.functional(model, p)

    def agree(params: ll.Adapter) -> None:
        x = x16().to(next(model.parameters()).dtype)
        found = []
        for call in (f, lambda *args: ll.apply(model, *args)):
            torch.manual_seed(0)
            found.append(call(params, x))
        assert torch.equal(*found)
        assert found[0].requires_grad is found[1].requires_grad

    with torch.set_grad_enabled(grad):
        agree(p)
        CHANGES[what](model)
        for params in (q, p):
            agree(params)


class Keeping(nn.Module):
    """Reads settings and plain containers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16, dtype=torch.float64)
        self.order: dict[str, list[int]] = {"order": [1, 2]}
        self.scale = 1.5
        self.names = {"up"}

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * self.scale * len(self.names) + sum(self.order["order"])


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.order["order"].append(5),
        lambda m: m.order.update(order=[7]),
        lambda m: setattr(m, "scale", 2.5),
        lambda m: m.names.add("down"),
        lambda m: setattr(m, "order", {"order": [9]}),
    ],
)
def test_plain_attributes_are_the_models_own(change: Any, copied: list[int]) -> None:
    model = Keeping()
    p, q, _ = adapters(model)
    f = ll.functional(model, p)
    for params in (p, q):
        assert torch.equal(f(params, x16()), ll.apply(model, params, x16()))
    assert len(copied) == 1
    change(model)
    for params in (p, q):
        assert torch.equal(f(params, x16()), ll.apply(model, params, x16()))


# ----------------------------------------------------------------------------------------- refusals
def test_what_is_refused() -> None:
    model = net()
    (params,) = adapters(model, 1)
    f = ll.functional(model, params)
    fewer = ll.init(model, ll.LoRAConfig(r=2, target_names=("up",)))
    with pytest.raises(
        ll.StructureError,
        match=r"made for \(lora on 4 sites\), found lora on 2 sites \('layers\.0\.down' is on one",
    ):
        f(fewer, x16())
    with pytest.raises(ll.StructureError, match="found hra on 4 sites; make another"):
        f(ll.init(model, ll.HRAConfig(r=2)), x16())
    with pytest.raises(ll.StructureError, match="found lora on 4 sites, lora on 4 sites"):
        f((params, params), x16())
    with pytest.raises(ll.StructureError, match=r"expected an Adapter, .* found Tensor"):
        f(x16(), params)
    with pytest.raises(ll.StructureError, match="a stack of 2 adapters"):
        f(ll.stack([params, params]), x16())
    with pytest.raises(ll.StructureError, match="no module at site"):
        ll.functional(nn.Sequential(nn.Linear(2, 2)), params)
    with pytest.raises(ll.StructureError, match=r"expected an Adapter, .* found str"):
        ll.functional(model, "lora")  # type: ignore[arg-type]
    with pytest.raises(ll.UnsupportedError, match=r"expected an nn\.Module, found Adapter"):
        ll.functional(params, model)  # type: ignore[arg-type]
    model.layers[0].up = nn.Linear(16, 40)
    with pytest.raises(ll.StructureError, match=r"site 'layers\.0\.up': expected 16 -> 24"):
        f(params, x16())


def test_a_layer_that_has_another_name_by_now_is_refused() -> None:
    model = Asking()
    p, q, _ = adapters(model)
    f = ll.functional(model, p)
    f(q, x16())
    model.below = model.down
    del model.down
    with pytest.raises(ll.StructureError, match="no module at site 'down'"):
        f(p, x16())


def test_a_bound_model_as_base(copied: list[int]) -> None:
    model = net()
    p, q, r = adapters(model)
    base = ll.bind(model, p)
    f = ll.functional(base, q)
    for params in (q, r):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert torch.equal(f(params, x16()), ll.apply(base, params, x16()))


def test_a_container_that_holds_itself() -> None:
    model = Keeping()
    itself: Any = [1]
    itself.append(itself)
    model.itself = itself
    p, q, _ = adapters(model)
    f = ll.functional(model, p)
    for params in (p, q):
        assert torch.equal(f(params, x16()), ll.apply(model, params, x16()))
