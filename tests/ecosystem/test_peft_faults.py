"""Faults of PEFT that this library doesn't share, each asserted: where one is mended there, its
test fails, and says that a comparison can take its place.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import close, moved, normal
from peft_models import activated_llama, peft
from torch import Tensor, nn

import lora_lite_func as ll

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[8, 5, 6, 7, 5, 6, 9], [5, 6, 8, 9, 3, 4, 7]])


def llama() -> Any:
    return FAMILIES["llama"].fresh()


def scores(model: Any, cached: bool) -> Tensor:
    """Logits of each step of `generate`, (steps, N, vocabulary)."""
    found = model.generate(
        input_ids=IDS,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        use_cache=cached,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(found.logits)


def expert(folder: Path, seed: int) -> str:
    cfg = ll.LoRAConfig(r=2, alpha=4.0, target_names=("q_proj", "up_proj"))
    ll.to_peft(moved(ll.init(llama(), cfg, seed=seed), seed, 0.3), llama(), folder)
    return str(folder)


def test_activated_lora_without_a_cache_loses_its_place(tmp_path: Path) -> None:
    theirs = activated_llama(tmp_path)
    with torch.no_grad():
        cached, whole = (scores(theirs, how) for how in (True, False))
    assert (cached - whole).abs().max() > 1e-3, "PEFT generates alike with and without a cache now"
    params = ll.from_peft(tmp_path, llama())
    mask = ll.invoked(IDS, params.config.invocation_tokens)
    bound = ll.bind(llama(), ll.activated(params, mask, goes_on=True))
    with torch.no_grad():
        close(scores(bound, True), scores(bound, False), 1e-5)
        close(scores(bound, True), cached, 1e-4)


def test_arrow_s_general_knowledge_is_subtracted_from_the_experts_themselves(
    tmp_path: Path,
) -> None:
    lora = pytest.importorskip("peft.tuners.lora")
    if not hasattr(lora, "create_arrow_model"):
        pytest.skip("this PEFT has no Arrow")
    experts, general = [expert(tmp_path / f"e{i}", i) for i in range(2)], expert(tmp_path / "g", 5)
    config = lora.ArrowConfig(rng_seed=0, use_gks=True, top_k=1)
    theirs = lora.create_arrow_model(llama(), experts, config, general_adapter_paths=[general])
    before = {name: p.clone() for name, p in theirs.named_parameters() if "lora_" in name}
    with torch.no_grad():
        theirs.eval()(input_ids=IDS)
    written = [n for n, p in theirs.named_parameters() if n in before and not before[n].equal(p)]
    assert written, "PEFT leaves the experts as they are now"


def test_cpt_writes_on_the_mask_that_it_is_given() -> None:
    config = peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 9, 7, 11], cpt_tokens_type_mask=[1, 2, 3, 4]
    )
    theirs = peft.get_peft_model(llama(), config).eval()
    kinds = torch.full_like(IDS, 4)
    theirs(input_ids=IDS, labels=IDS, input_type_mask=kinds)
    assert not torch.equal(kinds, torch.full_like(IDS, 4)), "PEFT leaves the mask as it is now"
    labels = IDS.clone()
    model = llama()
    ours = ll.init(model, ll.CPTConfig(r=4, token_ids=(5, 9, 7, 11), token_types=(1, 2, 3, 4)))
    ll.apply(model, ours, IDS, labels=labels)
    assert torch.equal(labels, IDS)


def test_x_lora_takes_numbered_experts_alone(tmp_path: Path) -> None:
    folders = {name: expert(tmp_path / name, i) for i, name in enumerate(("maths", "law"))}
    base = llama()
    base.config.use_cache = False
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=folders)
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad(), pytest.raises(KeyError):
        theirs(input_ids=IDS)
    experts = {name: ll.from_peft(folder, llama()) for name, folder in folders.items()}
    model = llama()
    with torch.no_grad():
        assert ll.xlora(model, experts, hidden_size=32)(model, IDS).logits.isfinite().all()


def test_poly_takes_inputs_of_three_dimensions_alone() -> None:
    model, x = nn.Sequential(nn.Linear(8, 6)), normal(4, 8, seed=0, dtype=torch.float32)
    config = peft.PolyConfig(r=2, n_tasks=2, n_skills=2, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    tasks = torch.tensor([0, 1, 1, 0])
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        theirs.base_model(x, task_ids=tasks)
    params = moved(ll.init(model, ll.PolyConfig(r=2, tasks=2, skills=2)))
    rows = ll.apply(model, ll.rows(ll.tasks(params), tasks), x)
    alone = [ll.apply(model, ll.tasks(params)[int(t)], x[i]) for i, t in enumerate(tasks)]
    close(rows, torch.stack(alone), 1e-6)


def test_vb_lora_draws_its_bank_for_each_layer_again() -> None:
    """The last draw is the bank, so what a seed gives depends on how many layers there are."""
    banks = []
    for layers in (1, 2):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
        config = peft.VBLoRAConfig(
            r=2, num_vectors=6, vector_length=4, target_modules=[str(i) for i in range(layers)]
        )
        torch.manual_seed(0)
        banks.append(peft.get_peft_model(model, config).base_model.vblora_vector_bank["default"])
    assert not torch.equal(*banks), "PEFT draws one bank now"
    starts = []
    for layers in (1, 2):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
        params = ll.init(model, ll.VBLoRAConfig(r=2, num_vectors=6, vector_length=4))
        starts.append(next(t for held in params.values() for n, t in held.items() if "bank" in n))
    assert torch.equal(*starts)
