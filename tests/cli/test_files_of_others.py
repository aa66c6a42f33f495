"""The command line on files of diffusers, kohya and lora-lite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import close
from torch import nn

import lora_lite_func as ll
from lora_lite_func.cli.main import main


class Base(nn.Module):
    """Two layers of a UNet."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.conv_in = nn.Linear(8, 12), nn.Conv2d(4, 8, 3)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    held = {name: t.detach() for name, t in Base().named_parameters()}
    safetensors.torch.save_file(held, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text('{"_class_name": "Base"}')
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> str:
    assert main(list(map(str, arguments))) == code
    caught = capsys.readouterr()
    return caught.out + caught.err


@pytest.mark.parametrize("style", ["diffusers", "kohya"])
def test_a_file_is_converted_inspected_checked_and_merged(
    style: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Base()
    params = ll.init(model, ll.LoRAConfig(r=2, alpha=3, target_kinds=("linear", "conv")))
    params = torch.utils._pytree.tree_map(lambda t: t + 0.1, params)
    own, file, back = (tmp_path / name for name in ("own.safetensors", "b.safetensors", "c"))
    ll.save(params, own)
    where = ("--model", base, "--component", "unet")
    assert "-> " in run(capsys, "convert", own, file, "--to", style, *where)
    expected = ll.merge(model, params)
    for key, t in ll.merge(model, ll.from_diffusion(file, model)).items():
        close(t.detach(), expected[key].detach(), 1e-6)
    assert "lora: 2 sites" in run(capsys, "inspect", file, *where)
    assert "fits" in run(capsys, "check", base, file, "--component", "unet")
    run(capsys, "convert", file, back, "--to", "ll", *where)
    assert set(ll.load(back)) == {"to_q", "conv_in"}
    run(capsys, "merge", base, file, tmp_path / "out", "--component", "unet")
    merged = safetensors.torch.load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    for key, t in expected.items():
        close(merged[key], t.detach(), 1e-6)


def test_what_is_lacking_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = Base(), tmp_path / "a.safetensors"
    params = ll.init(model, ll.LoRAConfig(r=2))
    ll.to_diffusion(params, model, file, component="unet")
    assert "give the base model too" in run(capsys, "inspect", file, code=1)
    out = tmp_path / "out"
    assert "give --model" in run(capsys, "convert", file, out, "--to", "kohya", code=1)
    ll.save(params, tmp_path / "own")
    how = ("--to", "kohya", "--model", base)
    assert "give --component" in run(capsys, "convert", tmp_path / "own", out, *how, code=1)
    how = ("--to", "diffusers", "--model", base, "--component", "unet")
    assert "is of the input itself" in run(capsys, "convert", file, file, *how, code=1)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_lora_lites_files(
    variant: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = Base(), tmp_path / "a.safetensors"
    tensors = {"to_q.lora_A": torch.randn(2, 8), "to_q.lora_B": torch.randn(12, 2)}
    if variant == "dora":
        tensors["to_q.lora_m"] = torch.rand(12)
    cfg = {"variant": variant, "r": 2, "alpha": 4, "dtype": "float32"}
    safetensors.torch.save_file(tensors, file, {"cfg": json.dumps(cfg)})
    assert f"{variant}: 1 sites" in run(capsys, "inspect", file, "--model", base)
    assert "fits" in run(capsys, "check", base, file)
    run(capsys, "convert", file, tmp_path / "peft", "--to", "peft", "--model", base)
    run(capsys, "merge", base, file, tmp_path / "out")
    merged = safetensors.torch.load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    expected = ll.merge(model, ll.from_lora_lite(file, model))["to_q.weight"].detach()
    close(merged["to_q.weight"], expected, 1e-5)
    again = ll.merge(model, ll.from_peft(tmp_path / "peft", model))["to_q.weight"].detach()
    close(again, expected, 1e-5)
