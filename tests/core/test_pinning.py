"""Pickles name the package's root alone, so they load whatever file a class is in; and pinned
classes are as they were for tools that read annotations.
"""

from __future__ import annotations

import dataclasses
import pickle
import pickletools
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import moved, net
from new_method import MixConfig

import lora_lite_func as ll

MODEL = net()
X = torch.randn(3, 16, dtype=torch.float64)
LORA, OTHER = (moved(ll.init(MODEL, ll.LoRAConfig(r=r))) for r in (2, 3))
ADALORA = ll.init(MODEL, ll.AdaLoRAConfig(r=2))
SCHEDULE = ll.adalora.Schedule(total_steps=9, initial_steps=1, final_steps=1, target_r=1)
STACK = ll.stack({"a": LORA, "b": OTHER})
VALUES: dict[str, Any] = {
    "an adapter": LORA,
    "a part": ll.partition(LORA)[0],
    "a stack": STACK,
    "rows": ll.rows(STACK, ["a", "b", "a"]),
    "a tuple": (LORA, moved(ll.init(MODEL, ll.IA3Config()))),
    "an outsider's": moved(ll.init(MODEL, MixConfig(r=2))),
    "a config": ll.PiSSAConfig(r=2),
    "a method": ll.variants()["dora"],
    "a site": LORA.sites["layers.0.up"],
    "a layout": STACK.layout,
    "a report": ll.check(MODEL, LORA, X),
    "statistics": ll.calibrate(MODEL, ll.EVAConfig(r=2), [X]),
    "a state": ll.adalora.start(ADALORA, SCHEDULE),
    "an error": ll.CheckpointError("what"),
    "verbs": [ll.apply, ll.to_peft, ll.adalora.prune],
}


def named(raw: bytes) -> set[str]:
    """Modules of the package that a pickle names."""
    strings = [a for _, a, _ in pickletools.genops(raw) if isinstance(a, str)]
    modules = {text.split(" ")[0] for text in strings}
    return {m for m in modules if m.partition(".")[0] == "lora_lite_func"}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", VALUES)
def test_pickles_name_the_root_alone(name: str, protocol: int) -> None:
    raw = pickle.dumps(VALUES[name], protocol)
    assert named(raw) <= {"lora_lite_func", "lora_lite_func.adalora"}
    pickle.loads(raw)


def test_values_come_back() -> None:
    for name in ("an adapter", "a tuple", "an outsider's", "rows"):
        again = pickle.loads(pickle.dumps(VALUES[name]))
        y = ll.apply(MODEL, VALUES[name], X)
        assert torch.equal(ll.apply(MODEL, again, X), y)
    assert pickle.loads(pickle.dumps(VALUES["a method"])) is VALUES["a method"]
    absent = pickle.loads(pickle.dumps(VALUES["a part"]))
    assert torch.equal(
        ll.apply(MODEL, ll.combine(absent, ll.partition(LORA)[1]), X), ll.apply(MODEL, LORA, X)
    )


def test_every_public_name_is_where_it_says() -> None:
    for name in ll.__all__:
        value = getattr(ll, name)
        if callable(value):
            assert value.__module__ == "lora_lite_func"
            assert pickle.loads(pickle.dumps(value)) is value


def test_annotations_can_be_read() -> None:
    for name in ll.__all__:
        value = getattr(ll, name)
        if isinstance(value, type):
            typing.get_type_hints(value)
    hints = typing.get_type_hints(ll.LoRAConfig)
    assert set(hints) >= {field.name for field in dataclasses.fields(ll.LoRAConfig)}
    assert hints["r"] is int


def test_a_class_of_a_user_is_left_alone(tmp_path: Path) -> None:
    assert MixConfig.__module__ == "new_method"
    ll.save(VALUES["an outsider's"], tmp_path / "a")
    assert type(ll.load(tmp_path / "a").config) is MixConfig
