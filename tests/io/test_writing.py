"""Writing: an interruption at any step loses nothing, permissions stay, only files are replaced."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, in_threads, moved, net, normal
from torch import nn

import lora_lite_func as ll
from lora_lite_func.io.swapping import swapped

X = normal(3, 16, seed=0, dtype=torch.float32)


@pytest.fixture
def model() -> nn.Module:
    return net(dtype=torch.float32)


def adapters(model: nn.Module) -> tuple[ll.Adapter, ll.Adapter]:
    """Two that differ in a setting and in their tensors."""
    return (
        moved(ll.init(model, ll.LoRAConfig(r=2, alpha=4)), seed=1),
        moved(ll.init(model, ll.LoRAConfig(r=2, alpha=64)), seed=2),
    )


KILLED = """
import os, sys, torch
sys.path.insert(0, "tests")
from helpers import moved, net
import lora_lite_func as ll
import lora_lite_func.io.writing
model = net(dtype=torch.float32)
params = moved(ll.init(model, ll.LoRAConfig(r=2, alpha=64)), seed=2)
calls, rename = 0, os.rename
def counted(a, b):
    global calls
    if calls == int(sys.argv[2]):
        os._exit(9)
    calls += 1
    rename(a, b)
os.rename = counted
ll.to_peft(params, model, sys.argv[1])
"""


@pytest.mark.parametrize("step", [0, 1, 2, 3, 4])
def test_a_killed_to_peft_leaves_one_adapter_or_none(
    step: int, model: nn.Module, tmp_path: Path
) -> None:
    old, new = adapters(model)
    ll.to_peft(old, model, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(step)],
        cwd=Path(ll.__file__).parent.parent,
        check=False,
    )
    assert done.returncode == (9 if step < 4 else 0)
    if step == 0:
        close(ll.apply(model, ll.from_peft(tmp_path, model), X), ll.apply(model, old, X), 1e-6)
    elif step < 4:
        with pytest.raises(ll.CheckpointError, match=r"expected adapter_.*was interrupted"):
            ll.from_peft(tmp_path, model)
    ll.to_peft(new, model, tmp_path)  # what the killed one left is gone after the next
    close(ll.apply(model, ll.from_peft(tmp_path, model), X), ll.apply(model, new, X), 1e-6)
    assert sorted(os.listdir(tmp_path)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), KeyboardInterrupt("stopped")], ids=["full", "stopped"]
)
def test_a_failed_to_peft_leaves_the_old_adapter(
    step: int,
    error: BaseException,
    model: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = adapters(model)
    ll.to_peft(old, model, tmp_path)
    calls, rename = iter(range(100)), os.rename

    def failing(a: Any, b: Any) -> None:
        if next(calls) == step:
            raise error
        rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        expected = ll.CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match=r"No space left|stopped"):
            ll.to_peft(new, model, tmp_path)
    close(ll.apply(model, ll.from_peft(tmp_path, model), X), ll.apply(model, old, X), 1e-6)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_folder_made_for_nothing_is_removed(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ll.CheckpointError, match="No space left"):
        ll.to_peft(adapters(model)[0], model, tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_a_folder_leave_one_of_their_adapters(
    model: nn.Module, tmp_path: Path
) -> None:
    both = adapters(model)
    results = [ll.apply(model, params, X) for params in both]

    def write(i: int) -> None:
        for _ in range(20):
            ll.to_peft(both[i], model, tmp_path)

    in_threads(len(both), write)
    y = ll.apply(model, ll.from_peft(tmp_path, model), X)
    assert any(torch.allclose(y, result) for result in results)
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_permissions_stay(mode: int, model: nn.Module, tmp_path: Path) -> None:
    params, _ = adapters(model)
    ll.save(params, tmp_path / "a")
    ll.to_peft(params, model, tmp_path / "peft")
    files = [tmp_path / "a", *sorted((tmp_path / "peft").iterdir())]
    fresh = [stat.S_IMODE(file.stat().st_mode) for file in files]
    (tmp_path / "plain").touch()
    assert set(fresh) == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}
    for file in files:
        file.chmod(mode)
    ll.save(params, tmp_path / "a")
    ll.to_peft(params, model, tmp_path / "peft")
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}


def test_only_files_are_replaced(model: nn.Module, tmp_path: Path) -> None:
    params, _ = adapters(model)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "adapter_config.json").mkdir()
    (tmp_path / "adapter_config.json" / "thesis.tex").touch()
    with pytest.raises(ll.CheckpointError, match="expected a file, found a pipe or a device"):
        ll.save(params, tmp_path / "pipe")
    with pytest.raises(ll.CheckpointError, match="expected a file, found a folder"):
        ll.to_peft(params, model, tmp_path)
    assert (tmp_path / "adapter_config.json" / "thesis.tex").exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_links_of_a_folder_are_replaced_not_followed(model: nn.Module, tmp_path: Path) -> None:
    params, _ = adapters(model)
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "folder" / "adapter_config.json").symlink_to(tmp_path / "mine.json")
    ll.to_peft(params, model, tmp_path / "folder")
    assert (tmp_path / "mine.json").read_text() == "{}"
    assert json.loads((tmp_path / "folder" / "adapter_config.json").read_text())["r"] == 2


def test_a_working_folder_in_use_is_left(tmp_path: Path) -> None:
    (tmp_path / ".merging-0123").mkdir()
    (tmp_path / ".merging-0123" / "old.safetensors").touch()
    with swapped(tmp_path, "test", marker="b") as mine:
        with swapped(tmp_path, "test", marker="a") as other:
            (other / "a").touch()
        assert sorted(os.listdir(tmp_path)) == [mine.name, "a"]
        (mine / "b").touch()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_what_came_meanwhile_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    def write() -> None:
        with swapped(tmp_path, "test", marker="a", replace=False) as work:
            (work / "a").write_text("new")
            (tmp_path / "a").write_text("old")

    with pytest.raises(ll.CheckpointError, match="a is there by now; nothing was changed"):
        write()
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
