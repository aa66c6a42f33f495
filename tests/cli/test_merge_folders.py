"""The folder that merge writes: nothing of another model is left to be read beside it, nothing else
is lost, and what a killed run left is no hindrance. And convert, which never writes on its input.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import close, in_threads, moved, net
from torch import nn

import lora_lite_func as ll
from lora_lite_func.cli.main import main

MODEL = net(dtype=torch.float32)


def written(folder: Path, shards: int) -> Path:
    """The model's folder, in one file or several."""
    folder.mkdir()
    state = MODEL.state_dict()
    if shards == 1:
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    else:
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        home = {key: names[i % shards] for i, key in enumerate(state)}
        for name in names:
            held = {key: t for key, t in state.items() if home[key] == name}
            safetensors.torch.save_file(held, folder / name, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    (folder / "config.json").write_text('{"model_type": "net"}')
    return folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in a folder."""
    files = sorted(folder.glob("*.safetensors"))
    found = {k: t for file in files for k, t in safetensors.torch.load_file(file).items()}
    return dict(sorted(found.items()))


def dense(params: ll.Adapter) -> dict[str, torch.Tensor]:
    """What a merged folder should hold."""
    return dict(sorted(ll.merged(MODEL, params).state_dict().items()))


@pytest.fixture
def adapter(tmp_path: Path) -> ll.Adapter:
    """An adapter in the file `a`."""
    params = moved(ll.init(MODEL, ll.LoRAConfig(r=2)))
    ll.save(params, tmp_path / "a")
    return params


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (3, 2)])
def test_force_over_the_other_layout(
    before: int, after: int, adapter: ll.Adapter, tmp_path: Path
) -> None:
    out = written(tmp_path / "out", before)
    (out / "pytorch_model.bin").touch()
    (out / "thesis.tex").write_text("mine")
    base = written(tmp_path / "base", after)
    assert main(["merge", str(base), str(tmp_path / "a"), str(out), "--force"]) == 0
    assert sorted(os.listdir(out)) == sorted([*os.listdir(base), "thesis.tex"])
    close(state(out), dense(adapter), 1e-6)


def test_what_would_be_read_beside_the_model_is_refused(
    adapter: ll.Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = written(tmp_path / "base", 2), tmp_path / "out"
    for name in ("adapter_config.json", "extra.safetensors"):
        out.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        assert main(["merge", str(base), str(tmp_path / "a"), str(out), "--force"]) == 1
        assert f"holds '{name}', which loaders would read" in capsys.readouterr().err
        assert os.listdir(out) == [name]
        (out / name).unlink()
    assert adapter


def test_what_a_killed_merge_left(
    adapter: ll.Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = written(tmp_path / "base", 2), tmp_path / "out"
    (out / ".merging-0123456789ab").mkdir(parents=True)
    (out / ".merging-0123456789ab" / "model.safetensors").touch()
    assert main(["check", str(out), str(tmp_path / "a")]) == 1
    assert "writing it was interrupted" in capsys.readouterr().err
    assert main(["merge", str(base), str(tmp_path / "a"), str(out)]) == 0
    assert sorted(os.listdir(out)) == sorted(os.listdir(base))
    close(state(out), dense(adapter), 1e-6)


@pytest.mark.parametrize("step", range(0, 9, 2))
def test_an_interrupted_swap_leaves_the_old_model(
    step: int, adapter: ll.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = written(tmp_path / "base", 2), written(tmp_path / "out", 3)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    calls, rename = iter(range(100)), os.rename

    def failing(a: Any, b: Any) -> None:
        if next(calls) == step:
            raise OSError(5, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    assert main(["merge", str(base), str(tmp_path / "a"), str(out), "--force"]) == 1
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert adapter


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_merged_files_are_as_private_as_the_bases(
    mode: int, adapter: ll.Adapter, tmp_path: Path
) -> None:
    base, out = written(tmp_path / "base", 2), tmp_path / "out"
    for file in base.iterdir():
        file.chmod(mode)
    assert main(["merge", str(base), str(tmp_path / "a"), str(out)]) == 0
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {mode}
    for file in out.iterdir():
        file.chmod(0o640)
    assert main(["merge", str(base), str(tmp_path / "a"), str(out), "--force"]) == 0
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o640}
    assert adapter


def test_an_index_that_names_what_is_not_there(
    adapter: ll.Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = written(tmp_path / "base", 2)
    index = base / "model.safetensors.index.json"
    says = json.loads(index.read_text())
    says["weight_map"]["layers.9.up.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(says))
    assert main(["merge", str(base), str(tmp_path / "a"), str(tmp_path / "out")]) == 1
    assert "'layers.9.up.weight' isn't in model-00001-of-00002" in capsys.readouterr().err
    assert adapter


def test_several_merges_at_once(adapter: ll.Adapter, tmp_path: Path) -> None:
    base, out = written(tmp_path / "base", 2), tmp_path / "out"
    codes: list[int] = []
    command = ["merge", str(base), str(tmp_path / "a"), str(out)]
    in_threads(3, lambda i: codes.append(main(command)))
    assert sorted(codes) == [0, 1, 1]
    assert sorted(os.listdir(out)) == sorted(os.listdir(base))
    close(state(out), dense(adapter), 1e-6)


# ------------------------------------------------------------------------------------------ convert
def test_convert_does_not_write_on_its_input(
    adapter: ll.Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = tmp_path / "peft"
    ll.to_peft(adapter, MODEL, peft)
    tensors = peft / "adapter_model.safetensors"
    (tmp_path / "link").symlink_to(tensors)
    os.link(tensors, tmp_path / "hard")
    ll.save(adapter, tmp_path / "adapter_model.safetensors")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    wrong = (
        (tensors, tensors, "ll"),
        (peft, tensors, "ll"),
        (peft, tmp_path / "link", "ll"),
        (peft, tmp_path / "hard", "ll"),
        (peft, peft, "peft"),
        (tensors, peft, "peft"),
        (tmp_path / "a", tmp_path / "a", "ll"),
        (tmp_path / "a", tensors, "ll"),
        (tmp_path / "adapter_model.safetensors", tmp_path, "peft"),
    )
    for source, output, form in wrong:
        assert main(["convert", str(source), str(output), "--to", form]) == 1
        assert "choose another output" in capsys.readouterr().err
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert after == before
    assert main(["convert", str(peft), str(tmp_path / "b"), "--to", "ll"]) == 0
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "again"), "--to", "peft"]) == 0
    x = torch.randn(2, 16)
    again = ll.from_peft(tmp_path / "again", MODEL)
    close(ll.apply(MODEL, again, x), ll.apply(MODEL, adapter, x), 1e-6)
    assert isinstance(MODEL, nn.Module)


def test_another_precision_and_another_format_beside_the_model(
    adapter: ll.Adapter, tmp_path: Path
) -> None:
    """Loaders take the plain names, so they are merged and nothing else goes along."""
    base, out = written(tmp_path / "base", 1), tmp_path / "out"
    half = {key: t.half() for key, t in MODEL.state_dict().items()}
    safetensors.torch.save_file(half, base / "model.fp16.safetensors")
    safetensors.torch.save_file(half, base / "consolidated.safetensors")
    (base / "model.safetensors.index.fp16.json").write_text("{}")
    assert main(["merge", str(base), str(tmp_path / "a"), str(out)]) == 0
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    close(state(out), dense(adapter), 1e-6)


@pytest.mark.parametrize("shards", [1, 2])
def test_the_folder_of_a_diffusion_models_component(
    shards: int, adapter: ll.Adapter, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    for file in sorted(written(tmp_path / "plain", shards).iterdir()):
        base.mkdir(exist_ok=True)
        text = file.name.replace("model", "diffusion_pytorch_model", 1)
        file.rename(base / (text if file.name.startswith("model") else file.name))
    for more in ([], ["--force"]):
        assert main(["merge", str(base), str(tmp_path / "a"), str(out), *more]) == 0
        assert sorted(os.listdir(out)) == sorted(os.listdir(base))
        close(state(out), dense(adapter), 1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "it has a pickled model: load it and save it again"),
        ("adapter_config.json", "it is an adapter's, where the base model's is wanted"),
        ("model_index.json", "a whole pipeline's: name the folder of one component"),
        ("", "what is on a hub is downloaded first"),
    ],
)
def test_a_base_that_is_something_else_says_so(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    if name:
        base.mkdir()
        (base / name).write_text("{}")
    assert main(["merge", str(base), str(tmp_path / "a"), str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
