"""methods, targets and init: what a newcomer asks about a model's folder, and a first adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import net

import lora_lite_func as ll
from lora_lite_func.cli.main import main
from lora_lite_func.cli.method_options import settings, unused_fields

SITES = ["layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder, in the names of `net`."""
    made = tmp_path / "model"
    made.mkdir()
    state = {name: t.contiguous() for name, t in net(dtype=torch.float32).state_dict().items()}
    safetensors.torch.save_file(state, made / "model.safetensors")
    return made


def data(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What a command answers as JSON."""
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_targets_are_those_of_the_library(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, words = net(dtype=torch.float32), ["targets", str(folder), "--targets", "up$", "down$"]
    cfg = ll.LoRAConfig(r=4, target_names=("up$", "down$"), layers=(-1,))
    found = data(capsys, *words, "--r", "4", "--layers", "-1")
    sites = ll.targets(model, cfg)
    assert [row["site"] for row in found["sites"]] == sorted(site.path for site in sites)
    assert found["trainable"] == ll.num_params(ll.init(model, cfg))
    assert found["trainable"] == sum(row["trainable"] for row in found["sites"])
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "layers.*.up" in printed
    assert len(printed.splitlines()) == 4  # the layers share a line


def test_methods_lists_every_method_and_its_cost(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = data(capsys, "methods")["methods"]
    assert {row["method"] for row in everything} == set(ll.variants())
    found = data(capsys, "methods", str(folder), "--r", "4", "--targets", "up$")
    assert found["parameters"] == sum(p.numel() for p in net().parameters())
    costs = {row["method"]: row for row in found["methods"]}
    cfg = ll.LoRAConfig(r=4, target_names=("up$",))
    assert costs["lora"]["trainable"] == ll.num_params(ll.init(net(), cfg))
    assert costs["lora"]["sites"] == 2
    assert costs["tokens"]["trainable"] is None
    assert costs["tokens"]["why"]
    assert main(["methods", str(folder)]) == 0
    assert "of a base of" in capsys.readouterr().out


def test_methods_knows_what_a_method_takes() -> None:
    known = ll.variants()
    assert unused_fields(known["ia3"]) == {"r", "alpha"}
    assert unused_fields(known["fourierft"]) == {"r"}
    assert unused_fields(known["hra"]) == {"alpha"}
    assert unused_fields(known["lora"]) == set()


@pytest.mark.parametrize("method", ["lora", "pissa", "ia3"])
def test_init_writes_what_the_library_makes(
    folder: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.safetensors"
    words = ["init", str(folder), str(file), "--method", method, "--targets", "up$", "--seed", "3"]
    assert data(capsys, *words)["sites"] == SITES[1::2]
    model = net(dtype=torch.float32)
    params = ll.load(file, model)
    cfg = ll.variants()[method].config(target_names=("up$",))
    for path, leaves in ll.init(model, cfg, seed=3).items():
        for name, t in leaves.items():
            torch.testing.assert_close(params[path][name], t)
    x = torch.randn(2, 16)
    assert torch.equal(ll.apply(model, params, x), model(x))
    assert main(["check", str(folder), str(file)]) == 0


def test_init_replaces_nothing_unasked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.safetensors"
    file.write_text("mine")
    words = ["init", str(folder), str(file)]
    assert main(words) == 1
    assert "is there already; --force replaces it" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert main([*words, "--force"]) == 0
    assert ll.load(file)


def test_settings_reach_the_config(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    words = ["init", str(folder), str(file), "--r", "2", "--alpha", "3", "--set", "rslora=true"]
    assert main([*words, "--set", "rank_pattern={'up$': 1}"]) == 0
    cfg = ll.load(file).config
    assert (cfg.r, cfg.alpha, cfg.rslora, cfg.rank_pattern) == (2, 3.0, True, (("up$", 1),))
    assert settings(["a=1e-3", "b=text", "c=False"]) == {"a": 1e-3, "b": "text", "c": False}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "drao"], "unknown method 'drao'; did you mean 'dora'?"),
        (["--set", "rslroa=1"], "no field 'rslroa'; did you mean 'rslora'?"),
        (["--set", "rslora"], "--set: expected NAME=VALUE, found 'rslora'"),
        (["--targets", "upp$"], "matched none of"),
        (["--method", "eva"], "calibration"),
    ],
)
def test_what_can_not_be_made_is_said(
    folder: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.safetensors"
    assert main(["init", str(folder), str(file), *words]) == 1
    assert said in capsys.readouterr().err
    assert not file.exists()


def test_a_folder_with_other_names_than_its_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "model")
    state = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    bare = {name.removeprefix("transformer."): t for name, t in state.items()}
    safetensors.torch.save_file(bare, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    rows = data(capsys, "targets", str(tmp_path / "model"), "--targets", "c_attn")["sites"]
    assert [row["site"] for row in rows] == ["transformer.h.0.attn.c_attn"]
    assert (rows[0]["d_in"], rows[0]["d_out"]) == (8, 24)


@pytest.mark.parametrize("verb", ["methods", "targets", "init", "inspect", "diff", "merge"])
def test_help_has_examples_and_no_colours(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([verb, "--help"], ["--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        printed = capsys.readouterr().out
        assert f"python -m lora_lite_func {verb}" in printed.split("examples:")[1]
        assert "\x1b" not in printed
