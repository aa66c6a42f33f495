"""Modules that a model's code reaches by itself: a class's attribute, a closure, a default, another
file's global. The original would be called without its adapter, so each is refused by name; what
only looks like one isn't.
"""

from __future__ import annotations

import contextvars
import functools
import gc
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from helpers import close, moved
from torch import Tensor, nn

import lora_lite_func as ll

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
OTHER_FILE: Any = types.ModuleType("other_file")
exec("layer = None\ndef run(x):\n    return layer(x)", vars(OTHER_FILE))
CONTEXT: contextvars.ContextVar[Any] = contextvars.ContextVar("CONTEXT")
SEEN_LATER: Any = None
WEIGHT: Any = None
WHOLE: Any = None


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def _class_attribute() -> nn.Module:
    class Model(Base):
        known: ClassVar[dict[str, Any]] = {}

        def forward(self, x: Tensor) -> Tensor:
            return self.known["a"](x)

    model = Model()
    Model.known["a"] = model.layer
    return model


def _attribute_of_another_class() -> nn.Module:
    class Registry:
        layer: Any = None

        @classmethod
        def run(cls, x: Tensor) -> Tensor:
            return cls.layer(x)

    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            return Registry.run(x)

    model = Model()
    Registry.layer = model.layer
    return model


def _weak_registry() -> nn.Module:
    class Model(Base):
        known: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

        def forward(self, x: Tensor) -> Tensor:
            return next(iter(self.known)).layer(x)

    model = Model()
    Model.known.add(model)
    return model


def _closure_of_a_class() -> nn.Module:
    layer = nn.Linear(4, 4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return layer(x)

    return Model()


def _default() -> nn.Module:
    layer = nn.Linear(4, 4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def run(self, x: Tensor, *, inner: nn.Module = layer) -> Tensor:
            return inner(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    return Model()


def _inherited() -> nn.Module:
    class Parent(Base):
        def forward(self, x: Tensor) -> Tensor:
            return SEEN_LATER(x)

    class Model(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    global SEEN_LATER
    SEEN_LATER = None
    model = Model()
    # What is known of a class is found out before its global is there.
    with pytest.raises(TypeError, match="not callable"):
        ll.apply(model, ll.init(model, ll.LoRAConfig(r=2)), X)
    SEEN_LATER = model.layer
    return model


def _helper() -> nn.Module:
    class Helper:
        def run(self, x: Tensor) -> Tensor:
            return OTHER_FILE.layer(x)

    class Model(Base):
        def __init__(self) -> None:
            super().__init__()
            self.helper = Helper()

        def forward(self, x: Tensor) -> Tensor:
            return self.helper.run(x)

    model = Model()
    OTHER_FILE.layer = model.layer
    return model


def _function_of_another_file() -> nn.Module:
    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            return OTHER_FILE.run(x)

    model = Model()
    OTHER_FILE.layer = model.layer
    return model


def _context() -> nn.Module:
    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            return CONTEXT.get()(x)

    model = Model()
    CONTEXT.set(model.layer)
    return model


def _kept_by_a_decorator() -> nn.Module:
    kept: dict[str, Any] = {}

    def keeping(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(forward)
        def run(self: Any, x: Tensor) -> Tensor:
            return forward(self, x, kept.setdefault("layer", self.layer))

        return run

    class Model(Base):
        @keeping
        def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
            return layer(x)

    model = Model()
    model(X)
    return model


def _global_weight() -> nn.Module:
    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            return x @ WEIGHT.mT

    global WEIGHT
    model = Model()
    WEIGHT = model.layer.weight
    return model


def _unregistered() -> nn.Module:
    class Model(Base):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [nn.Sequential(self.layer, nn.Tanh())]

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    return Model()


def _unregistered_and_compiled() -> nn.Module:
    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.fast(x)

    model = Model()
    model.__dict__["fast"] = torch.compile(model.layer, backend="eager")
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "class attribute": (_class_attribute, "the attribute 'known' of the class 'Model'"),
    "another class": (_attribute_of_another_class, "the attribute 'layer' of the class 'Registry'"),
    "weak registry": (_weak_registry, "the attribute 'known' of the class 'Model'"),
    "closure": (_closure_of_a_class, "the variable 'layer' of the function '.*Model.forward'"),
    "default": (_default, "a default of the function '.*Model.run'"),
    "inherited": (_inherited, "the global 'SEEN_LATER'"),
    "helper": (_helper, "its attribute 'helper' reads the global 'OTHER_FILE.layer'"),
    "another file": (_function_of_another_file, "the global 'layer'"),
    "context": (_context, "the global 'CONTEXT'"),
    "decorator": (_kept_by_a_decorator, "the variable 'kept' of the function"),
    "weight": (_global_weight, "the weight of 'layer'"),
    "unregistered": (_unregistered, "a Sequential that isn't registered as a module"),
    "compiled": (_unregistered_and_compiled, "OptimizedModule that isn't registered as a module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_code_reaches_by_itself_is_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    for verb in (
        lambda: ll.apply(model, params, X),
        lambda: ll.bind(model, params),
        lambda: ll.merged(model, params),
        lambda: ll.functional(model, params)(params, X),
    ):
        with pytest.raises(ll.UnsupportedError, match=rf"'' \(Model\): .*{message}"):
            verb()
    assert not ll.check(model, params, X).ok


def twice(x: Tensor) -> Tensor:
    """A function beside the global of a whole model."""
    return 2 * x


class Plain(Base):
    """Names a class attribute, a cached method and a function, none of which leads to it."""

    sizes = (4, 4)
    others: ClassVar[dict[str, Any]] = {}

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def named(self, name: str) -> Any:
        return getattr(self, name)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.sizes[0]
        assert "a" in self.others
        return twice(self.named("layer")(x))


def test_a_script_with_a_model_and_its_functions_in_globals() -> None:
    global WHOLE
    WHOLE = model = Plain()
    Plain.others["a"] = Plain()
    model(X)
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    y = ll.merged(model, params)(X)
    close(ll.apply(model, params, X), y, 1e-5)
    close(ll.functional(model, params)(params, X), y, 1e-5)
    close(ll.bind(model, params)(X), y, 1e-5)
    assert ll.check(model, params, X).ok


@dataclass
class Step:
    """Holds a layer, and a function around itself."""

    layer: nn.Module

    def __post_init__(self) -> None:
        self.run = lambda x: self.layer(x)


def _calling_itself(layer: nn.Module) -> Callable[..., Tensor]:
    def run(x: Tensor, again: bool = True) -> Tensor:
        made: Tensor = run(x, False) if again else run.layer(x)  # type: ignore[attr-defined]
        return made

    run.layer = layer  # type: ignore[attr-defined]
    return run


FOLLOWED: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "record with a function around itself": lambda layer: Step(layer).run,
    "attribute of a function": _calling_itself,
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_functions_that_hold_themselves_are_followed(name: str) -> None:
    class Model(Base):
        def __init__(self) -> None:
            super().__init__()
            self.step = Step(self.layer)
            self.run = FOLLOWED[name](self.layer)

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x) + self.step.run(x)

    model = Model()
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    W = ll.merge(model, params)["layer.weight"]
    y = 2 * nn.functional.linear(X, W, model.layer.bias)
    for made in (
        ll.apply(model, params, X),
        ll.bind(model, params)(X),
        ll.merged(model, params)(X),
    ):
        close(made, y, 1e-5)


def test_classes_and_functions_that_were_looked_at_are_freed() -> None:
    gone = []
    for make in (_default, lambda: _class_attribute()):
        model = make()
        gone += [weakref.ref(type(model)), weakref.ref(type(model).forward)]
        with pytest.raises(ll.UnsupportedError, match="can't be turned"):
            ll.apply(model, ll.init(model, ll.LoRAConfig(r=2)), X)
        del model
    gc.collect()
    assert not any(reference() for reference in gone)
