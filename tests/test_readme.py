"""README is run: its Python blocks in order in one namespace, its table of methods against the records."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import lora_lite_func as ll

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_every_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from lora_lite_func import spec

    registered = dict(spec._REGISTRY)
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
        spec._REGISTRY.clear()
        spec._REGISTRY.update(registered)
        torch._dynamo.reset()
    assert "Adapter(lora: 1 sites" in capsys.readouterr().out


def test_the_table_of_methods_is_what_the_records_say() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.methods_table import rewritten
    finally:
        sys.path.remove(str(ROOT))
    assert rewritten(README) == README, "run: python -m benchmarks.methods_table README.md"


def test_the_example_of_an_error_is_what_is_said() -> None:
    model = torch.nn.ModuleDict({f"{i}": torch.nn.ModuleDict({n: torch.nn.Linear(4, 4) for n in ("q_proj", "v_proj")}) for i in range(7)})
    with pytest.raises(ll.TargetError, match="'q_porj' matched none of 14") as caught:
        ll.init(model, ll.LoRAConfig(r=2, target_names=("q_porj",)))
    assert f"TargetError: {caught.value}" in README
