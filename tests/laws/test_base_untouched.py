"""Whatever is done with the verbs and with what they give, the base stays as it was: every tensor,
attribute, container, hook and config.
"""

from __future__ import annotations

import collections
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import moved
from torch import Tensor, nn
from torch_versions import GROUPED, groups_in_grad, skip_without

import lora_lite_func as ll


# ------------------------------------------------------------------------------------- the snapshot
def deep(model: nn.Module) -> dict[str, Any]:
    """{path: value} of everything that a model is made of, as values that don't change with it."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            found[f"{path}:{name}"] = _frozen(value, 0)
    return found


def _frozen(value: Any, depth: int) -> Any:
    if isinstance(value, Tensor):
        grad = None if value.grad is None or not value.is_leaf else value.grad.clone()
        values = value.detach().clone()
        return (type(value), id(value), value.requires_grad, values, grad)
    if isinstance(value, nn.Module) or depth > 6:
        return id(value)
    if isinstance(value, dict):
        items = [(_frozen(k, depth + 1), _frozen(v, depth + 1)) for k, v in value.items()]
        return (type(value), id(value), items)
    if isinstance(value, (list, tuple, collections.deque)):
        return (type(value), [_frozen(item, depth + 1) for item in value])
    if isinstance(value, (set, frozenset)):
        return (type(value), len(value), sorted(map(repr, value)))
    if hasattr(value, "__dict__") and not callable(value) and not isinstance(value, type):
        return (type(value), id(value), _frozen(vars(value), depth + 1))
    return value if isinstance(value, (str, int, float, bool, type(None))) else id(value)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return bool(isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype) and bool(
            ((a == b) | ((a != a) & (b != b))).all()
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return bool(a == b)


def unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = deep(model)
    assert before.keys() == after.keys()
    assert [name for name in before if not same(before[name], after[name])] == []


# ------------------------------------------------------------------------------------ what is done
def abuse(made: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    """What tools do to a model: training, hooks, casts, another config, new tensors."""
    made.train()
    trained = [p for p in made.parameters() if p.requires_grad]
    y = run(made)
    if trained and y.requires_grad:
        optimizer = torch.optim.AdamW(trained, lr=0.1)
        y.square().mean().backward()
        optimizer.step()
    made.register_forward_hook(lambda module, args, out: None)
    for module in list(made.modules()):
        module.register_buffer("noted", torch.zeros(1), persistent=False)
        module.some_attribute = 1
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules") or name.startswith("_ll"):
                continue
            if isinstance(value, list) and len(value) < 100:
                value.append("written")
            elif type(value) is dict:
                value["written"] = 1
    for name in ("config", "generation_config"):
        if hasattr(made, name):
            getattr(made, name).noted = "written"
    made.eval()
    run_quietly(lambda: run(made))
    made.requires_grad_(True)
    made.half()
    made.load_state_dict(made.state_dict())


def run_quietly(call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception:
        return  # what was written on it may well break it


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5", "vit", "mixtral"])
def test_real_models_stay_as_they_were(family: str) -> None:
    pytest.importorskip("transformers")
    described = FAMILIES[family]
    torch.manual_seed(0)
    model = described.build().eval()

    def run(made: nn.Module) -> Tensor:
        return described.output(made(**described.inputs))

    before = deep(model)
    params = moved(ll.init(model, ll.LoRAConfig(r=2, **described.config)))
    unchanged(before, model)
    ll.apply(model, params, **described.inputs)
    if family in GROUPED:
        skip_without(groups_in_grad)
    grads = torch.func.grad(
        lambda p: described.output(ll.apply(model, p, **described.inputs)).square().mean()
    )(params)
    assert len(grads)
    unchanged(before, model)
    if "input_ids" in described.inputs:
        ll.bind(model, params).resize_token_embeddings(model.config.vocab_size + 3)
        unchanged(before, model)
    made = (ll.bind(model, params), ll.prepared(model, params), ll.merged(model, params))
    unchanged(before, model)
    for one in made[:2]:
        abuse(one, run)
        unchanged(before, model)
    merged = made[2]
    merged.config.hidden_size = 1
    merged.train()
    run(merged)
    unchanged(before, model)


# ------------------------------------------------------------------------------------- odd models
class Special(nn.Parameter):
    """A parameter of a class of its own, with a note."""


class Counting(nn.Module):
    """Counts, keeps and caches while it is called, in every way that a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.odd = nn.Linear(4, 4)
        self.odd.weight = Special(torch.randn(4, 4))
        self.odd.weight.note = "kept"  # type: ignore[attr-defined]
        self.learned = nn.Buffer(torch.ones(4, requires_grad=True))
        for name, buffer in (
            ("used", torch.zeros(4, dtype=torch.long)),
            ("seen", torch.zeros(4, dtype=torch.bool)),
            ("phase", torch.zeros(2, dtype=torch.cfloat)),
            ("mean", torch.zeros(4)),
        ):
            self.register_buffer(name, buffer)
        self.cache: dict[str, Any] = {"old": torch.zeros(4), "lists": [[0]]}
        self.history: list[Any] = []
        self.names: set[int] = set()
        self.recent: collections.deque[int] = collections.deque([0], maxlen=3)
        self.plain = torch.zeros(4)
        self.wanted = torch.ones(4, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.used += 1
            self.seen |= True
            self.phase += 1j
            self.mean += 1
            self.plain += 1
            self.cache["old"] += 1
        self.cache["new"] = x
        self.cache["lists"][0].append(1)
        self.history.append(x.shape)
        self.names.add(len(self.names))
        self.recent.append(1)
        return self.odd(self.layer(x)) * self.learned * self.wanted


X = torch.randn(2, 4)


@pytest.mark.parametrize("training", [True, False])
def test_what_a_call_writes_is_the_copys_own(training: bool) -> None:
    model = Counting().train(training)
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    before = deep(model)
    y = ll.apply(model, params, X)
    assert not ll.apply(model, params, X.detach()).isnan().any()
    unchanged(before, model)
    bound, merged, prepared = (verb(model, params) for verb in (ll.bind, ll.merged, ll.prepared))
    for made in (bound, merged, prepared):
        made.train(training)
        assert torch.allclose(made(X), y, atol=1e-5)
        unchanged(before, model)
    bound(X).sum().backward()
    assert [n for n, p in bound.named_parameters() if p.requires_grad and "adapter" not in n] == []
    weight = bound.odd._parameters["weight"]
    assert type(weight) is Special
    assert weight.note == "kept"
    bound.half()
    unchanged(before, model)


class Running:
    """A user's object that is written on while a model runs."""

    def __init__(self) -> None:
        self.count = 0
        self.shapes: list[Any] = []
        self.total = torch.zeros(2)
        self.inner = {"more": types.SimpleNamespace(last=None)}

    def note(self, x: Tensor) -> None:
        self.count += 1
        self.shapes.append(x.shape)
        self.total += 1
        self.inner["more"].last = x.shape


class Beside(Running):
    """Refers to a layer, too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class Missing:
    """Tells that nothing was given, by being the one object of its class."""


MISSING = Missing()


class Always(nn.Module):
    """Writes in evaluation mode, too: on small and large buffers, plain tensors and objects."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = nn.Buffer(torch.zeros((), dtype=torch.long))
        self.queue = nn.Buffer(torch.zeros(4, 1 << 13), persistent=False)
        self.memory = torch.zeros(4, 1 << 13)
        self.running, self.beside = Running(), Beside(self.layer)
        self.listed = [Running(), self.running]
        self.default = MISSING
        calls = self.calls
        self.tick = lambda: calls.add_(1)

    def forward(self, x: Tensor) -> Tensor:
        self.tick()
        self.queue[:, : len(x)] = x.detach().mT
        self.memory.narrow(1, 0, len(x)).copy_(x.detach().mT)
        for one in (self.running, self.beside, *self.listed):
            one.note(x)
        assert self.default is MISSING
        seen = self.queue.sum() + self.memory.sum() + self.calls + self.running.count
        return self.beside.layer(x) + seen


def test_what_is_written_in_evaluation_mode_is_the_copys_own() -> None:
    model = Always().eval()
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    before = deep(model)
    right = (
        nn.functional.linear(X, ll.merge(model, params)["layer.weight"], model.layer.bias)
        + 2 * X.sum()
        + 3
    )
    for _ in range(2):
        assert torch.allclose(ll.apply(model, params, X), right, atol=1e-4)
        for made in (ll.bind(model, params), ll.prepared(model, params), ll.merged(model, params)):
            assert torch.allclose(made(X), right, atol=1e-4)
            assert made.running is made.listed[1]
        with torch.inference_mode():
            ll.apply(model, params, X)
        unchanged(before, model)


class Bounding(nn.Module):
    """Writes on its parameters, and on a norm's statistics in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied = nn.ParameterList([self.other.weight])
        self.scale = nn.Parameter(torch.ones(4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.clamp_(0, 0.5)
            self.other.weight.data = self.other.weight.data.clamp(-0.1, 0.1)
        self.norm.num_batches_tracked += 1
        self.norm.running_mean.mul_(0.5).add_(x.detach().mean(0))  # type: ignore[union-attr, operator]
        return self.norm(self.other(self.layer(x)) * self.scale)


def test_parameters_that_a_call_writes_on_are_the_copys_own() -> None:
    model = Bounding().eval()
    params = moved(ll.init(model, ll.LoRAConfig(r=2, target_names=("^layer$",))))
    before = deep(model)
    merged = ll.merged(model, params)
    y = merged(X)
    assert torch.allclose(ll.apply(model, params, X), y, atol=1e-5)
    for verb in (ll.bind, ll.prepared):
        assert torch.allclose(verb(model, params)(X), y, atol=1e-5)
    unchanged(before, model)
    assert merged.scale.data_ptr() != model.scale.data_ptr()
    assert merged.layer.weight.data_ptr() != model.layer.weight.data_ptr()
    assert merged.layer.bias.data_ptr() == model.layer.bias.data_ptr()  # nobody writes on it
    assert merged.tied[0] is merged.other.weight


class Reading(nn.Module):
    """Only reads a large table, which is a buffer, and a norm's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.table = nn.Buffer(torch.zeros(1 << 15))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, found: list[int]) -> Tensor:
        assert isinstance(self.norm.running_mean, Tensor)
        found.extend((self.table.data_ptr(), self.norm.running_mean.data_ptr()))
        return self.norm(self.layer(x)) + self.table[0]


def test_what_is_only_read_is_not_copied() -> None:
    model = Reading().eval()
    found: list[int] = []
    ll.apply(model, ll.init(model, ll.LoRAConfig(r=2)), X, found)
    assert isinstance(model.norm.running_mean, Tensor)
    assert found == [model.table.data_ptr(), model.norm.running_mean.data_ptr()]


class Stats(nn.Module):
    """Two modules with one cache and one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: list[int] = []
        self.count = nn.Buffer(torch.zeros(3))
        self.layer = nn.Linear(4, 4)
        self.inner = nn.Linear(4, 4)
        self.inner.cache = self.cache  # type: ignore[assignment]
        self.inner.register_buffer("count", self.count)
        self.inner.register_forward_hook(lambda module, args, y: self.cache.append(1))

    def forward(self, x: Tensor) -> Tensor:
        self.cache.append(1)
        self.count += 1
        y = self.inner(self.layer(x))
        assert isinstance(self.inner.count, Tensor)
        return y * len(self.cache) + (self.inner.count - self.count).abs().sum()


def test_what_is_one_object_stays_one() -> None:
    model = Stats().train()
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    dense = Stats().train()
    dense.load_state_dict(ll.merged(model, params).state_dict())
    y = dense(X)
    for made in (ll.bind(model, params), ll.merged(model, params)):
        assert torch.allclose(made(X), y, atol=1e-5)
    assert torch.allclose(ll.apply(model, params, X), y, atol=1e-5)
    assert model.cache == []
    assert not model.count.any()


# --------------------------------------------------------------------------------------- no growth
def test_a_hundred_models_leave_no_layer_and_no_class() -> None:
    def once() -> tuple[weakref.ref[Any], weakref.ref[Any]]:
        class Own(nn.Linear):
            pass

        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), Own(8, 8))
        params = ll.init(model, ll.LoRAConfig(r=2))
        ll.apply(model, params, torch.randn(1, 8))
        ll.bind(model, params)(torch.randn(1, 8))
        return weakref.ref(model[0]), weakref.ref(Own)

    def classes() -> int:
        gc.collect()
        return sum(issubclass(type(found), type) for found in gc.get_objects())

    for _ in range(3):
        once()
    count = classes()
    references = [reference for _ in range(100) for reference in once()]
    assert classes() <= count
    assert [r for r in references if r() is not None] == []
