"""PEFT's Arrow routers: read with the folders of their experts, and equal in outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import close
from torch import Tensor

import lora_lite_func as ll

peft = pytest.importorskip("peft")
lora = pytest.importorskip("peft.tuners.lora")
if not hasattr(lora, "create_arrow_model"):
    pytest.skip("this PEFT has no Arrow", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))


def expert(folder: Path, seed: int) -> str:
    """A trained LoRA whose updates have one direction that stands out, so that PEFT's 15 power
    steps find it.
    """
    model = FAMILIES["llama"].fresh()
    params = ll.init(model, ll.LoRAConfig(r=3, alpha=6.0, target_names=("q_proj", "up_proj")))
    gen = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1.0, 0.1, 0.1])
    data = {
        path: {
            "lora_A": torch.randn(held["lora_A"].shape, generator=gen) * sizes[:, None],
            "lora_B": torch.randn(held["lora_B"].shape, generator=gen) * 0.3,
        }
        for path, held in params.items()
    }
    ll.to_peft(ll.Adapter(params.layout, data), model, folder)
    return str(folder)


def theirs(
    tmp_path: Path, experts: list[str], general: list[str], **how: Any
) -> tuple[Path, Tensor]:
    """The router's folder, and PEFT's outputs."""
    config = lora.ArrowConfig(rng_seed=0, use_gks=bool(general), **how)
    model = lora.create_arrow_model(
        FAMILIES["llama"].fresh(), experts, config, general_adapter_paths=general
    ).eval()
    with torch.no_grad():
        y = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "all")
    return tmp_path / "all" / "arrow_router", y


@pytest.mark.parametrize("general", [False, True])
def test_outputs_are_peft_s(general: bool, tmp_path: Path) -> None:
    experts = [expert(tmp_path / f"e{i}", i) for i in range(3)]
    others = [expert(tmp_path / f"g{i}", 5 + i) for i in range(2)] if general else []
    router, wanted = theirs(tmp_path, experts, others, top_k=2, router_temperature=0.5)
    model = FAMILIES["llama"].fresh()
    params = ll.from_peft(router, model, experts=experts, general=others)
    assert (params.config.top_k, params.config.temperature) == (2, 0.5)
    with torch.no_grad():
        y = ll.apply(model, params, IDS).logits
        close(y, wanted, 1e-4)
        assert (y - model(IDS).logits).abs().max() > 0.05
    given = [ll.from_peft(folder, model) for folder in experts]
    close(ll.from_peft(router, model, experts=given, general=others), params, 0.0)


def test_a_router_alone_has_nothing_to_route(tmp_path: Path) -> None:
    experts = [expert(tmp_path / f"e{i}", i) for i in range(2)]
    router, _ = theirs(tmp_path, experts, [], top_k=1)
    model = FAMILIES["llama"].fresh()
    message = r"holds no experts, .*experts=\[...\].* expected task_0, task_1, found"
    for given in ((), experts[:1]):
        with pytest.raises(ll.CheckpointError, match=f"{message} {len(given)}"):
            ll.from_peft(router, model, experts=given)
    with pytest.raises(ll.CheckpointError, match="general: expected none, found 1"):
        ll.from_peft(router, model, experts=experts, general=experts[:1])
    with pytest.raises(ll.CheckpointError, match=r"experts: .* isn't an Arrow router's"):
        ll.from_peft(experts[0], model, experts=experts)
    file = router / "adapter_config.json"
    said = json.loads(file.read_text())
    said["arrow_config"]["more"] = 3
    file.write_text(json.dumps(said))
    with pytest.raises(ll.CheckpointError, match="arrow_config: 'more' is 3"):
        ll.from_peft(router, model, experts=experts)
