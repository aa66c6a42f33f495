"""What the command line prints: nothing that a terminal would act on, always JSON, differences of
names and order.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import moved, net
from torch import Tensor, nn

import lora_lite_func as ll
from lora_lite_func.cli.main import main
from lora_lite_func.core.errors import printable

EVIL = "0\x1b]0;owned\x07\nno difference\u202e\x9b2J"


def renamed(file: Path, old: str, new: str) -> None:
    """The file with one of its sites called otherwise."""
    with safetensors.safe_open(str(file), "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        says = json.loads(opened.metadata()["lora_lite_func"])
    says["sites"] = [[new if row[0] == old else row[0], *row[1:]] for row in says["sites"]]
    tensors = {k.replace(f"{old}.lora", f"{new}.lora"): t for k, t in tensors.items()}
    safetensors.torch.save_file(tensors, file, {"lora_lite_func": json.dumps(says)})


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two adapters with an evil site each."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for name, seed in (("a", 1), ("b", 2)):
        ll.save(moved(ll.init(model, ll.LoRAConfig(r=2)), seed=seed), tmp_path / name)
        renamed(tmp_path / name, "0", EVIL)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def harmless(text: str) -> bool:
    return all(line.isprintable() for line in text.splitlines()) and "\u2028" not in text


def test_printable() -> None:
    assert printable("layers.0.größe 日本") == "layers.0.größe 日本"
    assert printable("a\x1b[2J\n\u202e\udc80") == "a\\x1b[2J\\n\\u202e\\udc80"


def test_names_are_printed_harmless(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", files[0]]) == 0
    text = capsys.readouterr().out
    assert harmless(text)
    assert len(text.splitlines()) == 5  # head, config, columns, two sites
    assert main(["diff", *files]) == 1
    text = capsys.readouterr().out
    assert harmless(text)
    assert "no difference" not in text.splitlines()
    renamed(Path(files[1]), EVIL, EVIL + "2")
    assert main(["diff", *files]) == 1
    assert harmless(capsys.readouterr().out)
    assert harmless(repr(ll.load(files[0])))
    safetensors.torch.save_file(net(dtype=torch.float32).state_dict(), tmp_path / "m.safetensors")
    for command in (["check", str(tmp_path), files[0]], ["inspect", str(tmp_path / EVIL)]):
        assert main(command) == 1
        captured = capsys.readouterr()
        assert harmless(captured.err)
        assert len(captured.err.splitlines()) == 1
    folder = tmp_path / "peft"
    folder.mkdir()
    tensors = {"base_model.model.0.lora_A.weight": torch.zeros(2, 4)}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": EVIL}))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    assert main(["inspect", str(folder)]) == 1
    assert harmless(capsys.readouterr().err)


def test_names_of_parts_and_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    one, two = (moved(ll.init(model, ll.LoRAConfig(r=2)), seed=seed) for seed in (1, 2))
    ll.save({EVIL: one, "b": two}, tmp_path / "a")
    ll.save(ll.stack({EVIL: one, "b": two}), tmp_path / "b")
    for name in ("a", "b"):
        assert main(["inspect", str(tmp_path / name)]) == 0
        assert harmless(capsys.readouterr().out)


def test_a_stream_of_another_encoding(tmp_path: Path) -> None:
    model = nn.ModuleDict({"größe": nn.Linear(4, 4)})
    ll.save(ll.init(model, ll.LoRAConfig(r=2)), tmp_path / "a")
    done = subprocess.run(
        [sys.executable, "-m", "lora_lite_func", "inspect", str(tmp_path / "a")],
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(ll.__file__).parent.parent)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert rb"gr\xf6\xdfe" in done.stdout


# -------------------------------------------------------------------------------------------- JSON
def refuse(word: str) -> Any:
    raise AssertionError(f"{word} isn't JSON")


def test_json_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    bad = torch.utils._pytree.tree_map(lambda t: t * float("inf"), params)
    ll.save(params, tmp_path / "a")
    ll.save(bad, tmp_path / "b")
    found = {}
    for verb, code, *names in (("inspect", 0, "b"), ("diff", 1, "a", "b"), ("inspect", 1, "none")):
        assert main([verb, *(str(tmp_path / name) for name in names), "--json"]) == code
        found[names[-1], verb] = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["b", "inspect"]["sites"][0]["norm"] in ("NaN", "Infinity")
    assert found["b", "diff"][""]["tensors"]["0.lora_A"]["max"] in ("NaN", "Infinity")
    assert "not a readable safetensors file" in found["none", "inspect"]["error"]


# -------------------------------------------------------------------------------------------- diff
def differ(tmp_path: Path, a: Any, b: Any) -> int:
    ll.save(a, tmp_path / "a")
    ll.save(b, tmp_path / "b")
    return main(["diff", str(tmp_path / "a"), str(tmp_path / "b")])


def test_diff_tells_names_order_and_container(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    one, two = (moved(ll.init(model, ll.LoRAConfig(r=2)), seed=seed) for seed in (1, 2))
    three = moved(ll.init(model, ll.LoRAConfig(r=4)), seed=3)
    assert differ(tmp_path, ll.stack({"fr": one, "de": two}), ll.stack({"de": one, "fr": two})) == 1
    assert "member fr: 0.lora_A: max" in capsys.readouterr().out
    assert differ(tmp_path, ll.stack({"fr": one, "de": two}), ll.stack({"de": two, "fr": one})) == 1
    assert capsys.readouterr().out == "members' names: fr, de / de, fr\n"
    assert differ(tmp_path, ll.stack({"fr": one, "de": two}), ll.stack([one, two])) == 1
    assert capsys.readouterr().out == "members' names: fr, de / no names\n"
    assert differ(tmp_path, ll.stack({"a": one, "b": two}), ll.stack({"a": one, "c": two})) == 1
    assert differ(tmp_path, ll.stack({"a": one, "b": three}), ll.stack({"a": one, "b": two})) == 1
    assert "member b: 0: linear 4 -> 4, r=4" in capsys.readouterr().out
    assert differ(tmp_path, (one, two), {"0": one, "1": two}) == 1
    assert capsys.readouterr().out == "a tuple of adapters / a dict of adapters\n"
    assert differ(tmp_path, {"a": one, "b": two}, {"a": one, "b": two}) == 0
    assert differ(tmp_path, ll.stack({"a": one, "b": three}), ll.stack({"a": one, "b": three})) == 0


def test_diff_of_what_is_no_number(tmp_path: Path) -> None:
    params = ll.init(nn.Sequential(nn.Linear(4, 4)), ll.LoRAConfig(r=2))

    def first(value: float) -> ll.Adapter:
        def change(t: Tensor) -> Tensor:
            t = t.clone()
            t.view(-1)[0] = value
            return t

        return torch.utils._pytree.tree_map(change, params)

    assert differ(tmp_path, first(float("nan")), first(float("nan"))) == 0
    assert differ(tmp_path, first(float("nan")), first(1.0)) == 1
    assert differ(tmp_path, first(float("inf")), first(float("-inf"))) == 1
