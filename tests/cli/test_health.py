"""What an adapter's values show: NaN, updates of zero, one shard of several; what the verbs do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import moved, net, normal
from torch import Tensor, nn

import lora_lite_func as ll
from lora_lite_func.cli.health import health, health_lines, update_norm
from lora_lite_func.cli.main import main

MODEL = net(dtype=torch.float32)
X = normal(3, 16, seed=0, dtype=torch.float32)


def changed(params: ll.Adapter, path: str, name: str, change: Any) -> ll.Adapter:
    """The adapter with one leaf changed."""
    data = {p: dict(held) for p, held in params.items()}
    data[path][name] = change(data[path][name].clone())
    return ll.Adapter(params.layout, data)


def lora(r: int = 4) -> ll.Adapter:
    return moved(ll.init(MODEL, ll.LoRAConfig(r=r)))


def poisoned(value: float = float("nan")) -> ll.Adapter:
    def change(t: Tensor) -> Tensor:
        t[0, 0] = value
        return t

    return changed(lora(), "layers.0.up", "lora_A", change)


def shard(t: Tensor) -> Tensor:
    t[6:] = 0
    return t


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value: float) -> None:
    assert health(poisoned(value))["not_finite"] == ["layers.0.up.lora_A"]
    assert health({"x": poisoned(value)})["not_finite"] == ["x/layers.0.up.lora_A"]
    assert health(ll.stack([lora(), poisoned(value)]))["not_finite"] == ["layers.0.up.lora_A"]
    report = ll.check(MODEL, poisoned(value), X)
    assert not report.ok
    assert report.not_finite == ("layers.0.up.lora_A",)
    assert "NaN or infinity in layers.0.up.lora_A" in str(report)


def test_outputs_that_are_no_numbers() -> None:
    model = nn.Sequential(MODEL, nn.Softmax(-1))  # of infinities is NaN
    params = ll.scale(moved(ll.init(model, ll.LoRAConfig(r=4))), 1e38)
    report = ll.check(model, params, X)
    assert report.not_finite == ()
    assert not report.ok
    assert "NaN or infinite where the base's isn't" in str(report)


def test_updates_of_zero_and_shards() -> None:
    fresh = ll.init(MODEL, ll.LoRAConfig(r=4))
    found = health(fresh)
    assert found["zero"] == list(fresh)
    assert health_lines(found, 4)[0].startswith("the update of every site is zero")
    assert health(lora()) == {"not_finite": [], "zero": [], "cut": []}
    found = health(changed(lora(), "layers.0.up", "lora_B", shard))
    assert found["cut"] == [
        "layers.0.up.lora_B: entries 6 to 23 along its axis 0 are zero, as where one shard of 4 "
        "was saved"
    ]
    ranks = changed(
        lora(r=8), "layers.0.up", "lora_A", lambda t: t * (torch.arange(8) < 4)[:, None]
    )
    assert health(ranks)["cut"] == []  # ranks that aren't used are no shard
    assert health(ll.init(MODEL, ll.IA3Config()))["cut"] == []


def test_norms_of_factors_are_those_of_updates() -> None:
    for config in (ll.LoRAConfig(r=4), ll.PiSSAConfig(r=4), ll.AdaLoRAConfig(r=4)):
        params = moved(ll.init(MODEL, config))
        dense = ll.merge(MODEL, params)
        for path in params:
            change = dense[f"{path}.weight"] - MODEL.get_submodule(path).weight
            assert update_norm(params, path) == pytest.approx(
                float(change.detach().norm()), rel=1e-4
            )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The model's folder."""
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file(MODEL.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    return tmp_path / "base"


def test_the_verbs_say_so(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = str(tmp_path / "a"), tmp_path / "out"
    ll.save(poisoned(), file)
    assert main(["inspect", file]) == 0
    assert "! NaN or infinity in layers.0.up.lora_A" in capsys.readouterr().out
    assert main(["check", str(base), file]) == 1
    assert "! NaN or infinity in layers.0.up.lora_A" in capsys.readouterr().out
    assert main(["check", str(base), file, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["fits"]
    assert not data["ok"]
    assert main(["merge", str(base), file, str(out)]) == 1
    assert "'layers.0.up.lora_A' holds NaN or infinity" in capsys.readouterr().err
    assert not out.exists()
    assert main(["merge", str(base), file, str(out), "--force"]) == 0
    tensors = safetensors.torch.load_file(out / "model.safetensors")
    assert tensors["layers.0.up.weight"].isnan().any()
    ll.save(changed(lora(), "layers.0.up", "lora_B", shard), file)
    assert main(["check", str(base), file]) == 0
    assert "only in part: layers.0.up.lora_B: entries 6 to 23" in capsys.readouterr().out


def test_a_merge_that_overflows_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").mkdir()
    state = {name: t.half() for name, t in MODEL.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "base" / "model.safetensors")
    ll.save(changed(lora(), "layers.0.up", "lora_B", lambda t: t * 1e6), tmp_path / "a")
    command = ["merge", str(tmp_path / "base"), str(tmp_path / "a"), str(tmp_path / "out")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "'layers.0.up.weight': the merged tensor holds NaN or infinity in torch.float16" in said
    assert main([*command, "--force"]) == 0
