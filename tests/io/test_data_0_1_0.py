"""Files and pickles that version 0.1.0 wrote load, and give the outputs that it gave."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_lite_func as ll

FOLDER = Path(__file__).parent / "data_0_1_0"
EXPECTED = safetensors.torch.load_file(FOLDER / "expected.safetensors")


@pytest.fixture
def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).eval()
    state = {k.removeprefix("model."): t for k, t in EXPECTED.items() if k.startswith("model.")}
    made.load_state_dict(state)
    return made


def gives(model: nn.Module, params: Any, name: str) -> None:
    """The adapter gives the output that it gave."""
    y: Tensor = ll.apply(model, params, EXPECTED["x"])
    torch.testing.assert_close(y, EXPECTED[f"y.{name}"], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(y, model(EXPECTED["x"]), atol=1e-3)


@pytest.mark.parametrize("name", ["lora", "ia3", "pissa", "vera", "tuple"])
def test_adapters(name: str, model: nn.Module) -> None:
    gives(model, ll.load(FOLDER / f"{name}.safetensors", model), name)


@pytest.mark.parametrize("name", ["stack", "same"])
def test_stacks(name: str, model: nn.Module) -> None:
    stack = ll.load(FOLDER / f"{name}.safetensors", model)
    for i in range(2):
        gives(model, stack[i], f"{name}.{i}")
        gives(model, ll.load(FOLDER / f"{name}.safetensors", model, member=i), f"{name}.{i}")
    if name == "stack":
        assert ll.names(stack) == ("fr", "de")
        x = EXPECTED["x"][:2]
        y = ll.apply(model, ll.rows(stack, ["de", "fr"]), x)
        rows = torch.stack([EXPECTED["y.stack.1"][0], EXPECTED["y.stack.0"][1]])
        torch.testing.assert_close(y, rows, atol=1e-6, rtol=1e-6)


def test_dicts(model: nn.Module) -> None:
    found = ll.load(FOLDER / "dict.safetensors", model)
    assert list(found) == ["a", "b"]
    for name, params in found.items():
        gives(model, params, f"dict.{name}")


def test_a_file_written_again_says_the_same(tmp_path: Path) -> None:
    for file in FOLDER.glob("*.safetensors"):
        if file.name != "expected.safetensors":
            ll.save(ll.load(file), tmp_path / file.name)
            old, new = (safetensors.torch.load_file(f) for f in (file, tmp_path / file.name))
            assert old.keys() == new.keys()
            assert all(torch.equal(t, new[key]) for key, t in old.items())


def test_pickles(model: nn.Module) -> None:
    found = {file.stem: pickle.loads(file.read_bytes()) for file in FOLDER.glob("*.pickle")}
    gives(model, found["adapter"], "lora")
    gives(model, found["tuple"], "tuple")
    for i in range(2):
        gives(model, found["stack"][i], f"stack.{i}")
    assert found["config"] == ll.LoRAConfig(r=2, target_names=("0",))
    again = pickle.loads(pickle.dumps(found["adapter"]))
    gives(model, again, "lora")
