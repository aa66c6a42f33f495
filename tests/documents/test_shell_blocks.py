"""Each page's commands on adapters' files are run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import close, moved, net
from pages import PAGES, ROOT, commands

import lora_lite_func as ll
from lora_lite_func.cli import main as command_line

ADAPTER_COMMAND = "python -m lora_lite_func "


def adapter_commands(page: str) -> list[list[str]]:
    """A page's commands on adapters' files, each as its words after the program's name."""
    lines = [line for line in commands(page) if line.startswith(ADAPTER_COMMAND)]
    return [shlex.split(line)[3:] for line in lines]


WITH_ADAPTERS = [page for page in PAGES if adapter_commands(page)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the pages' commands name: base_folder, adapter.safetensors, a and b.safetensors."""
    model = net(dtype=torch.float32)
    (tmp_path / "base_folder").mkdir()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "base_folder" / "model.safetensors")
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    for name, adapter in (("adapter", params), ("a", params), ("b", ll.scale(params, 0.5))):
        ll.save(adapter, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.parametrize("page", WITH_ADAPTERS)
def test_commands_on_adapters_run(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for words in adapter_commands(page):
        code = command_line.main(words)
        printed = capsys.readouterr()
        assert code == (words[0] == "diff"), f"{words}: {printed.err}"
        assert printed.out.strip()
        assert not printed.err
    if page == "lora_lite_func/guides/serving.md":
        assert {words[0] for words in adapter_commands(page)} >= set(VERBS)
        _left_by_merge_and_convert(folder)


VERBS = ("methods", "targets", "init", "inspect", "diff", "convert", "merge", "check")


def _left_by_merge_and_convert(folder: Path) -> None:
    model = net(dtype=torch.float32)
    params = ll.load(folder / "adapter.safetensors", model)
    merged = safetensors.torch.load_file(folder / "merged_folder" / "model.safetensors")
    dense = sorted(ll.merged(model, params).state_dict().items())
    close([merged[k] for k in sorted(merged)], [t for _, t in dense], 1e-6)
    x = torch.randn(3, 16)
    read = ll.from_peft(folder / "peft_folder", model)
    close(ll.apply(model, read, x), ll.apply(model, params, x), 1e-6)


def test_the_first_of_readme_runs_in_a_process_of_its_own(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora_lite_func", *adapter_commands("README.md")[0]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not done.stderr
