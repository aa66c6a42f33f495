"""README is run: its Python blocks in order in one namespace, its table of methods against the records."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import close, moved, net

import lora_lite_func as ll

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_every_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from lora_lite_func.core import method as methods

    registered = dict(methods._REGISTRY)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "readme"}
    module = type(sys)("readme")
    module.__dict__.update(namespace)
    sys.modules["readme"] = module
    try:
        blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
        assert len(blocks) >= 8
        for block in blocks:
            exec(compile(block, "README.md", "exec"), module.__dict__)
    finally:
        del sys.modules["readme"]
        methods._REGISTRY.clear()
        methods._REGISTRY.update(registered)
        torch._dynamo.reset()
    assert "Adapter(lora: 1 sites" in capsys.readouterr().out


BASH = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
    for line in block.splitlines()
]


def test_the_command_line_block_runs(tmp_path: Path) -> None:
    model = net(dtype=torch.float32)
    (tmp_path / "base_folder").mkdir()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "base_folder" / "model.safetensors")
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    for name, adapter in (("adapter", params), ("a", params), ("b", ll.scale(params, 0.5))):
        ll.save(adapter, tmp_path / f"{name}.safetensors")
    commands = [shlex.split(line) for line in BASH if line.startswith("python -m lora_lite_func")]
    assert [words[3] for words in commands] == ["inspect", "diff", "convert", "merge", "check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for words in commands:
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (words[3] == "diff"), done.stderr
        assert done.stdout.strip()
        assert not done.stderr
    merged = safetensors.torch.load_file(tmp_path / "merged_folder" / "model.safetensors")
    close(
        [merged[k] for k in sorted(merged)],
        [t for _, t in sorted(ll.merged(model, params).state_dict().items())],
        1e-6,
    )
    x = torch.randn(3, 16)
    close(
        ll.apply(model, ll.from_peft(tmp_path / "peft_folder", model), x),
        ll.apply(model, params, x),
        1e-6,
    )


class _UnderstoodError(Exception):
    """A command's arguments were parsed, and it would start now."""


NAMED = sorted(
    {
        (m, a.strip())
        for m, a in re.findall(
            r"python -m (benchmarks[\w.]*)((?: [^`\n#&]*)?)", re.sub("<!--.*?-->", "", README)
        )
    }
)


@pytest.mark.parametrize(("module", "arguments"), NAMED)
def test_a_command_that_is_named_is_understood(
    module: str, arguments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(parser: argparse.ArgumentParser, arguments: Any = None, namespace: Any = None) -> None:
        _, more = parser.parse_known_args(arguments, namespace)
        assert not more, more
        raise _UnderstoodError("ready")

    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *shlex.split(arguments)])
    found = importlib.import_module(f"{module}.__main__" if module == "benchmarks" else module)
    if (
        module == "benchmarks.methods_table"
    ):  # takes a file, and is held to it by the test of the table
        assert (ROOT / arguments).is_file()
        return
    with pytest.raises(_UnderstoodError, match="ready"):
        found.main()


def test_what_the_installing_commands_name_exists() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with 3.11")
    tomllib = importlib.import_module("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    installing = [line for line in BASH if "pip install" in line]
    assert len(installing) == 2
    for line in installing:
        (named,) = re.findall(r"'\.\[([\w,]+)\]'", line)
        assert set(named.split(",")) <= extras.keys()
        (constraints,) = re.findall(r"-c (\S+)", line)
        assert (ROOT / constraints).is_file()
    for file, word in re.findall(r"`pytest (\S+) -k (\w+)`", README):
        assert re.search(rf"def test_\w*{word}", (ROOT / file).read_text(encoding="utf-8")), word


def test_the_table_of_methods_is_what_the_records_say() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.methods_table import rewritten
    finally:
        sys.path.remove(str(ROOT))
    assert rewritten(README) == README, "run: python -m benchmarks.methods_table README.md"


def test_the_example_of_an_error_is_what_is_said() -> None:
    model = torch.nn.ModuleDict(
        {
            f"{i}": torch.nn.ModuleDict({n: torch.nn.Linear(4, 4) for n in ("q_proj", "v_proj")})
            for i in range(7)
        }
    )
    with pytest.raises(ll.TargetError, match="'q_porj' matched none of 14") as caught:
        ll.init(model, ll.LoRAConfig(r=2, target_names=("q_porj",)))
    assert f"TargetError: {caught.value}" in README
