"""Where models keep their modules beside the module tree: the adapted copy is reached through all
of it, or check tells.
"""

from __future__ import annotations

import collections
import functools
import itertools
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import close, moved, normal, same_state, snapshot
from torch import Tensor, nn

import lora_lite_func as ll

X = normal(3, 4, seed=0, dtype=torch.float32)


@dataclass
class Record:
    layer: nn.Module


class Helper:
    """An object of a user's own that holds a layer, and itself."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.me = layer, self

    def run(self, x: Tensor) -> Tensor:
        return self.me.layer(x)


@dataclass(frozen=True, slots=True)
class Slots:
    layer: nn.Module
    note: str = "data"


class Hidden:
    """Keeps a layer in a slot whose name Python mangles, beside a dict."""

    __slots__ = ("__dict__", "__layer")

    def __init__(self, layer: nn.Module) -> None:
        self.__layer, self.also = layer, layer

    def run(self, x: Tensor) -> Tensor:
        return (self.__layer(x) + self.also(x)) / 2


class Single:
    """Has a `__new__` of its own, which asks for arguments."""

    def __new__(cls, layer: nn.Module) -> Single:
        assert isinstance(layer, nn.Module)
        return object.__new__(cls)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Layers(list[Any]):
    """A list with a constructor of its own."""

    def __init__(self, note: str, *layers: nn.Module) -> None:
        super().__init__(layers)
        self.note, self.count = note, len(layers)


class Fixed(tuple[Any, ...]):
    """A tuple with a constructor of its own."""

    def __new__(cls, note: str, *layers: nn.Module) -> Fixed:
        return super().__new__(cls, layers)


class Locked(dict[str, Any]):
    """A dict that nothing can be put into."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("locked")


def _with_keyword_default(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor, *, inner: nn.Module = layer) -> Tensor:
        return inner(x)

    return run


def _called(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x)


HOLDERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Tensor], Tensor]]] = {
    "deque": (lambda m: collections.deque([m], maxlen=3), lambda h, x: h[0](x)),
    "set": (lambda m: {m}, lambda h, x: next(iter(h))(x)),
    "frozenset": (lambda m: frozenset([m]), lambda h, x: next(iter(h))(x)),
    "defaultdict": (lambda m: collections.defaultdict(list, a=[m]), lambda h, x: h["a"][0](x)),
    "long list": (lambda m: [m] * 300, lambda h, x: h[-1](x)),
    "dataclass": (Record, lambda h, x: h.layer(x)),
    "namespace": (lambda m: types.SimpleNamespace(m=m), lambda h, x: h.m(x)),
    "object": (Helper, lambda h, x: h.run(x)),
    "bound method": (lambda m: Helper(m).layer.forward, lambda h, x: h(x)),
    "slots": (Slots, lambda h, x: h.layer(x)),
    "mangled slot": (Hidden, lambda h, x: h.run(x)),
    "its own new": (Single, lambda h, x: h.layer(x)),
    "long list of pairs": (lambda m: [(str(i), m) for i in range(300)], lambda h, x: h[-1][1](x)),
    "key of a dict": (lambda m: {m: 1.0}, lambda h, x: next(iter(h))(x) * h[next(iter(h))]),
    "key of an ordered dict": (
        lambda m: collections.OrderedDict({m: m}),
        lambda h, x: h[next(iter(h))](x),
    ),
    "weak proxy": (weakref.proxy, lambda h, x: h(x)),
    "weak reference": (weakref.ref, lambda h, x: h()(x)),
    "closure": (lambda m: lambda x: m(x), lambda h, x: h(x)),
    "keyword default": (lambda m: _with_keyword_default(m), lambda h, x: h(x)),
    "user dict": (lambda m: collections.UserDict(a=m), lambda h, x: h["a"](x)),
    "user list": (lambda m: collections.UserList([m]), lambda h, x: h[0](x)),
    "chain map": (lambda m: collections.ChainMap({}, {"a": m}), lambda h, x: h["a"](x)),
    "mapping proxy": (lambda m: types.MappingProxyType({"a": m}), lambda h, x: h["a"](x)),
    "list with a constructor": (lambda m: Layers("two", m), lambda h, x: h[0](x) + 0 * h.count),
    "tuple with a constructor": (lambda m: Fixed("note", m), lambda h, x: h[0](x)),
    "frozen dict": (lambda m: Locked(a=m), lambda h, x: h["a"](x)),
    "weak keys": (
        lambda m: weakref.WeakKeyDictionary({m: 1.0}),
        lambda h, x: next(iter(h))(x) * next(iter(h.values())),
    ),
    "weak values": (lambda m: weakref.WeakValueDictionary(a=m), lambda h, x: h["a"](x)),
    "weak set": (lambda m: weakref.WeakSet([m]), lambda h, x: next(iter(h))(x)),
    "weak method": (lambda m: weakref.WeakMethod(m.forward), lambda h, x: h()(x)),
    "cached function": (
        lambda m: functools.lru_cache(maxsize=2)(lambda name: m),
        lambda h, x: h("a")(x),
    ),
    "built-in method": (lambda m: {"a": m}.get, lambda h, x: h("a")(x)),
    "partial": (lambda m: functools.partial(_called, layer=m), lambda h, x: h(x)),
    "late in a long list": (lambda m: [None] * 300 + [m], lambda h, x: h[-1](x)),
    "many attributes": (
        lambda m: types.SimpleNamespace(m=m, **{f"a{i}": i for i in range(40)}),
        lambda h, x: h.m(x),
    ),
    "deep": (lambda m: [[[[{"a": (m,)}]]]], lambda h, x: h[0][0][0][0]["a"][0](x)),
}


class Holding(nn.Module):
    """Reaches its layer through what holds it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        make, self.call = HOLDERS[name]
        # not by setattr, which takes a proxy of a module for a module
        self.__dict__["held"] = make(self.layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.held, x)


@pytest.mark.parametrize("name", HOLDERS)
def test_an_adapted_layer_is_found_wherever_it_is_held(name: str) -> None:
    model = Holding(name)
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    before = snapshot(model)
    dense = nn.Linear(4, 4)
    dense.weight, dense.bias = (
        nn.Parameter(ll.merge(model, params)["layer.weight"]),
        model.layer.bias,
    )
    close(ll.apply(model, params, X), dense(X), 1e-5)
    close(ll.bind(model, params)(X), dense(X), 1e-5)
    assert ll.check(model, params, X).ok
    assert same_state(before, snapshot(model))


FINALISED: list[int] = []


class Finalised:
    """Frees something when it goes."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __del__(self) -> None:
        FINALISED.append(1)


def test_an_object_with_a_finaliser_is_not_copied() -> None:
    model = Holding("dataclass")
    model.held = Finalised(model.layer)
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    for verb in (lambda: ll.apply(model, params, X), lambda: ll.bind(model, params)):
        with pytest.raises(
            ll.UnsupportedError,
            match=r"'' \(Holding\): its attribute 'held' holds an object of Finalised, which "
            r"leads to the "
            r"module 'layer'; that can't be turned",
        ):
            verb()
    assert not FINALISED
    found = ll.check(model, params, X)
    assert not found.ok
    assert found.escaped == ("layer",)
    assert not FINALISED


class Slotted(nn.Module):
    """Keeps attributes in slots, a layer among them."""

    __slots__ = ("extra", "hidden")

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        object.__setattr__(self, "extra", 3.0)
        object.__setattr__(self, "hidden", self.layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(x) * self.extra


def test_slots_are_copied() -> None:
    model = Slotted()
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    close(ll.apply(model, params, X), ll.merged(model, params)(X), 1e-5)
    assert (ll.apply(model, params, X) - model(X)).abs().max() > 1e-3
    assert ll.check(model, params, X).ok


KEPT: list[nn.Module] = []


class Global(nn.Module):
    """Reaches its layer through a global, which nobody can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        KEPT[:] = [self.layer]

    def forward(self, x: Tensor) -> Tensor:
        return KEPT[0](x)


def test_what_cannot_be_followed_is_told() -> None:
    model = Global()
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'' \(Global\): its call reads the global 'KEPT', which leads to the module 'layer'",
    ):
        ll.apply(model, params, X)
    found = ll.check(model, params, X)
    assert not found.ok
    assert found.escaped == found.uncalled == ("layer",)
    assert "without the adapter: layer; something that can't be followed refers to them" in repr(
        found
    )


def _itself(layer: Any) -> Any:
    return layer


OPAQUE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "iterator": (lambda m: iter([m]), "an object of list_iterator"),
    "cycle": (lambda m: itertools.cycle([m]), "an object of cycle"),
    "generator": (lambda m: (layer for layer in [m]), "an object of generator"),
    "map": (lambda m: map(_itself, [m]), "an object of map"),
    "by a global": (lambda m: lambda x: KEPT[0](x), "which reads the global 'KEPT', which leads"),
    "weight in a list": (lambda m: [m.weight], "holds the weight of 'layer'; that can't be turned"),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_cannot_be_followed_is_refused_by_name(name: str) -> None:
    make, message = OPAQUE[name]
    model = Holding("dataclass")
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    KEPT[:] = [model.layer]
    model.held = make(model.layer)
    for verb in (lambda: ll.apply(model, params, X), lambda: ll.bind(model, params)):
        with pytest.raises(ll.UnsupportedError, match=rf"'' \(Holding\): .*{message}"):
            verb()


class Hooked(nn.Module):
    """Adds what another layer gives, by a hook of the kind asked for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        b = self.b
        if kind == "method":
            self.a.register_forward_hook(self.add)
        elif kind == "closure":
            self.a.register_forward_hook(lambda module, args, y: y + b(args[0]))
        elif kind == "keyword default":
            self.a.register_forward_hook(_keyword_hook(b))
        elif kind == "partial":
            self.a.register_forward_hook(functools.partial(_add, b))
        elif kind == "object":
            self.a.register_forward_hook(Adder(b))
        elif kind == "with keywords":
            self.a.register_forward_hook(
                lambda module, args, kwargs, y: y + b(args[0]), with_kwargs=True
            )
        else:
            self.register_forward_pre_hook(lambda module, args: (args[0], b(args[0])))

    def add(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + self.b(args[0])

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        y = self.a(x)
        return y if more is None else y + more


class Adder:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + self.layer(args[0])


def _add(layer: nn.Module, module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return y + layer(args[0])


def _keyword_hook(b: nn.Module) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, y: Tensor, *, layer: nn.Module = b) -> Tensor:
        return y + layer(args[0])

    return hook


@pytest.mark.parametrize(
    "kind",
    ["method", "closure", "keyword default", "partial", "object", "with keywords", "pre-hook"],
)
def test_hooks_call_the_adapted_layers(kind: str) -> None:
    model = Hooked(kind)
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    before = snapshot(model)
    dense = ll.merge(model, params)
    y = nn.functional.linear(X, dense["a.weight"] + dense["b.weight"], model.a.bias + model.b.bias)
    bound = ll.bind(model, params)
    for made in (ll.apply(model, params, X), bound(X), ll.merged(model, params)(X)):
        close(made, y, 1e-5)
    bound(X).sum().backward()
    assert bound.b.adapter[0].lora_B.grad is not None
    assert ll.check(model, params, X).ok
    assert same_state(before, snapshot(model))


class Proxy(nn.Module):
    """Answers for the layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_wrapper_that_answers_for_its_layer_is_no_second_site() -> None:
    assert [site.path for site in ll.targets(nn.Sequential(Proxy()), ll.LoRAConfig(r=2))] == [
        "0.inner"
    ]


def test_complex_and_lazy_layers_are_refused_by_name() -> None:
    with pytest.raises(
        ll.UnsupportedError, match="'0': its weight is complex, and adapters are real"
    ):
        ll.init(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)), ll.LoRAConfig(r=2))
    with pytest.raises(
        ll.UnsupportedError, match=r"'1' \(LazyBatchNorm1d\) is lazy.*call the model once"
    ):
        ll.init(nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d()), ll.LoRAConfig(r=2))
