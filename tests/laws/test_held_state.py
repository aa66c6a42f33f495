"""What a model keeps beside its tensors, in any container or array, is the copy's own in every
call; looking at a model writes nothing on it, either.
"""

from __future__ import annotations

import array
import collections
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import moved
from torch import Tensor, nn

import lora_lite_func as ll


class Log(NamedTuple):
    """A tuple that can't be written on, of a list and a tensor that can."""

    calls: list[int]
    total: Tensor


class Registry(dict[str, Any]):
    """A dict whose constructor asks for something, with a list of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.calls = size, list[int]()


class Pair(tuple[Any, ...]):
    """A tuple of a class of its own."""


class Key:
    """Something that a weak container may refer to."""


KEY = Key()


def _log(log: Log) -> None:
    log.calls.append(1)
    log.total.add_(1)


def _numpy() -> Any:
    return pytest.importorskip("numpy").zeros(2)


HELD: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "named tuple": (
        lambda: Log([], torch.zeros(2)),
        _log,
        lambda h: (len(h.calls), h.total.tolist()),
    ),
    "named tuples in a dict": (
        lambda: {"a": Log([], torch.zeros(2))},
        lambda h: _log(h["a"]),
        lambda h: (len(h["a"].calls), h["a"].total.tolist()),
    ),
    "own tuple": (lambda: Pair(([], 1)), lambda h: h[0].append(1), lambda h: len(h[0])),
    "user dict": (collections.UserDict, lambda h: h.update(a=1), len),
    "user list": (collections.UserList, lambda h: h.append(1), len),
    "chain map": (lambda: collections.ChainMap({}), lambda h: h.update(a=1), len),
    "view": (
        lambda: types.MappingProxyType({"a": []}),
        lambda h: h["a"].append(1),
        lambda h: len(h["a"]),
    ),
    "own dict": (
        lambda: Registry(1),
        lambda h: (h.update(a=1), h.calls.append(1)),
        lambda h: (len(h), len(h.calls), h.size),
    ),
    "weak keys": (weakref.WeakKeyDictionary, lambda h: h.update({KEY: 1}), len),
    "weak values": (weakref.WeakValueDictionary, lambda h: h.update(a=KEY), len),
    "weak set": (weakref.WeakSet, lambda h: h.add(KEY), len),
    "array of numpy": (_numpy, lambda h: h.__iadd__(1), lambda h: h.tolist()),
    "arrays in a list": (
        lambda: [_numpy()],
        lambda h: h[0].__iadd__(1),
        lambda h: h[0].tolist(),
    ),
    "bytes": (lambda: bytearray(2), lambda h: h.__setitem__(0, 1), list),
    "array": (lambda: array.array("i", [0]), lambda h: h.__setitem__(0, 1), list),
}


class Holding(nn.Module):
    """Writes on what it holds in every call."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        make, self.write, self.read = HELD[name]
        self.held, self.inner = make(), nn.Identity()
        self.inner.held = self.held  # one object in two places

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        x[0] = 1  # its code writes in place
        self.write(self.inner.held)
        assert self.read(self.held) == self.read(self.inner.held)
        return self.layer(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", HELD)
def test_what_a_call_writes_is_the_copys_own(name: str, training: bool) -> None:
    model = Holding(name).train(training)
    before = model.read(model.held)
    params, x = moved(ll.init(model, ll.LoRAConfig(r=2))), torch.randn(2, 4)
    y = ll.apply(model, params, x)
    for made in (ll.bind(model, params).train(training), ll.merged(model, params)):
        assert torch.allclose(made(x), y, atol=1e-5)
        assert made.read(made.held) != before
    ll.functional(model, params)(params, x)
    assert ll.check(model, params, x).ok
    assert model.read(model.held) == before


def test_a_view_is_of_the_copys_own_mapping() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.known = nn.Linear(4, 4), dict[str, int]()
            self.view = types.MappingProxyType(self.known)

        def forward(self, x: Tensor) -> Tensor:
            self.known["a"] = 1
            return self.layer(x) * self.view["a"]

    model = Viewing()
    params = ll.init(model, ll.LoRAConfig(r=2))
    for call in (ll.bind(model, params), lambda x: ll.apply(model, params, x)):
        call(torch.randn(2, 4))
    assert not model.known


class Measured(nn.Module):
    """A norm of a user's own that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.count, self.plain = nn.Buffer(torch.zeros(2)), torch.zeros(2)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.plain += 1
        self.calls.append(1)
        return nn.functional.rms_norm(x, x.shape[-1:]) * self.weight


def test_looking_at_a_model_writes_nothing_on_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Measured(), nn.Linear(4, 4))
    norm, x = model[1], torch.randn(8, 4)
    assert [site.path for site in ll.targets(model, ll.LNTuningConfig())] == ["1"]
    params = ll.init(model, ll.LNTuningConfig())
    ll.check(model, params, x)
    ll.calibrate(model, ll.EVAConfig(r=2), [x])
    assert isinstance(norm, Measured)
    assert not norm.count.any()
    assert not norm.plain.any()
    assert norm.calls == []
