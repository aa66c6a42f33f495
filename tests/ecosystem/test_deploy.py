"""Adapters in tools that move, checkpoint and compile whatever they are given."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, normal
from torch import Tensor, nn

import lora_lite_func as ll

X = normal(3, 8, seed=0, dtype=torch.float32)


class Applied(nn.Module):
    """ll.apply as a module of (adapter, input)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, params: Any, x: Tensor) -> Any:
        return ll.apply(self.model, params, x)


def adapter(cfg: ll.AdapterConfig | None = None) -> ll.Adapter:
    made: ll.Adapter = torch.utils._pytree.tree_map(
        lambda t: t + 0.1, ll.init(Applied().model, cfg or ll.LoRAConfig(r=2))
    )
    return made


def test_to_moves_and_casts() -> None:
    params = adapter(ll.DoRAConfig(r=2))
    assert {t.device.type for h in params.to("meta").values() for t in h.values()} == {"meta"}
    half = params.to(dtype=torch.bfloat16)
    assert half["0"]["lora_A"].dtype == torch.bfloat16
    assert half["0"]["lora_m"].dtype == torch.float32  # magnitudes are float32 at least
    assert torch.utils._pytree.tree_structure(half) == torch.utils._pytree.tree_structure(params)
    for path, held in ll.cast(params, torch.bfloat16).items():
        assert all(torch.equal(t, half[path][name]) for name, t in held.items())
    assert params.to(torch.float16)["0"]["lora_A"].dtype == torch.float16
    assert torch.equal(params.to()["0"]["lora_A"], params["0"]["lora_A"])
    trained, _ = ll.partition(params)
    assert "lora_A" in trained.to("cpu")["0"]
    with pytest.raises(ll.StructureError, match="expected a floating dtype of 16 bits"):
        params.to(dtype=torch.int32)


def test_accelerate_sends_an_adapter_with_a_batch() -> None:
    utils = pytest.importorskip("accelerate.utils")
    params = adapter()
    sent = utils.send_to_device({"params": params, "x": X}, "meta")
    assert isinstance(sent["params"], ll.Adapter)
    assert sent["params"]["0"]["lora_A"].is_meta
    assert utils.send_to_device(params, torch.device("cpu")).layout == params.layout


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_torch_distributed_checkpoints_take_its_dicts(tmp_path: Path) -> None:
    """Saved and loaded in place, without a process group, beside other state."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    params = adapter(ll.DoRAConfig(r=2))
    dcp.save({"adapter": ll.to_dict(params), "step": torch.tensor(3)}, checkpoint_id=str(tmp_path))
    start = ll.init(Applied().model, ll.DoRAConfig(r=2), seed=5)
    state = {"adapter": ll.to_dict(ll.cast(start, torch.float32)), "step": torch.tensor(0)}
    dcp.load(state, checkpoint_id=str(tmp_path))
    again = ll.from_dict(state["adapter"], start)
    assert int(state["step"]) == 3
    for path, held in params.items():
        assert all(torch.equal(t, again[path][name]) for name, t in held.items())


def test_a_layout_travels_as_text_that_cpp_can_hold() -> None:
    """C++ that holds it as a raw string ends at a closing bracket before a quotation mark."""
    params = adapter(ll.LoRAConfig(r=2, target_names=r"(^|\\.)(0|2)$"))
    spec = torch.utils._pytree.tree_structure(params)
    says = torch.utils._pytree.treespec_dumps(spec)
    assert params.config.target_names[0].endswith(")$")
    assert ")" not in says
    assert torch.utils._pytree.treespec_loads(says) == spec
    before = json.loads(says)  # of programs that were exported before 0.2.0: JSON, not text
    before[1]["context"] = json.loads(before[1]["context"])
    assert torch.utils._pytree.treespec_loads(json.dumps(before)) == spec


@pytest.mark.filterwarnings("ignore::FutureWarning:copyreg")
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++")
@pytest.mark.skipif(sys.platform != "linux", reason="as it is in CI")
def test_aotinductor_takes_an_adapter(tmp_path: Path) -> None:
    params = adapter()
    program = torch.export.export(Applied(), (params, X))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "a.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for p in (params, torch.utils._pytree.tree_map(lambda t: 2 * t, params)):
        close(run(p, X), Applied()(p, X), 1e-5)
