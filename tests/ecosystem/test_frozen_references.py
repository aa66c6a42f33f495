"""The reference of a policy: its own start, which doesn't move with it; in TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, IDS
from helpers import close, leaves, moved
from torch import Tensor

import lora_lite_func as ll

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=4), ll.PiSSAConfig(r=2), ll.VeRAConfig(r=8)])
def test_a_reference_stays_where_the_policy_was(cfg: ll.AdapterConfig) -> None:
    model: Any = FAMILIES["qwen3"].fresh()
    policy: Any = ll.bind(model, moved(ll.init(model, cfg)))
    start = logits(policy)
    reference: Any = ll.reference(policy.train())
    assert type(reference) is type(policy)
    assert not reference.training
    assert not any(p.requires_grad for p in reference.parameters())
    shared = model.model.embed_tokens.weight.data_ptr()
    assert reference.model.embed_tokens.weight.data_ptr() == shared
    assert torch.equal(logits(reference), start)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1.0)
    policy(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert (logits(policy.eval()) - start).abs().max() > 1e-3
    assert torch.equal(logits(reference), start)
    assert isinstance(ll.unbind(reference), ll.Adapter)


def test_what_a_tool_put_on_the_policy_is_on_its_reference() -> None:
    model: Any = FAMILIES["qwen3"].fresh()
    policy: Any = ll.bind(model, moved(ll.init(model, ll.LoRAConfig(r=4))))
    call = policy.forward

    def scored(self: Any, ids: Tensor, doubled: bool = False, **how: Any) -> Tensor:
        y: Tensor = call(ids, **how).logits
        return 2 * y if doubled else y

    policy.forward = scored.__get__(policy)
    with torch.no_grad():
        start = policy(IDS, doubled=True).clone()
        reference = ll.reference(policy)
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(1.0)
        assert torch.equal(reference(IDS, doubled=True), start)
        assert not torch.equal(policy(IDS, doubled=True), start)


def test_a_model_without_an_adapter_has_none() -> None:
    with pytest.raises(ll.StructureError, match=r"expected a module made by ll\.bind"):
        ll.reference(torch.nn.Linear(2, 2))


# -------------------------------------------------------------------------------------------- TRL
@pytest.fixture
def loaded(tmp_path: Path) -> tuple[Any, Any]:
    """A model from a folder, and its tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("trl")
    folder = tmp_path / "base"
    made: Any = FAMILIES["qwen3"].fresh()
    made.save_pretrained(folder)
    words = {f"w{i}": i for i in range(64)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "w0", "eos_token": "w2", "bos_token": "w1"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.save_pretrained(folder)
    return type(made).from_pretrained(folder), tokenizer


COMMON = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
COMMON |= {"learning_rate": 1e-2, "save_steps": 2, "logging_steps": 1}


def test_trls_sft_takes_a_bound_model(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    import datasets
    import trl

    model, tokenizer = loaded
    data = datasets.Dataset.from_list([{"text": "w3 w4 w5 w6"}] * 8)
    bound: Any = ll.bind(model, ll.init(model, ll.LoRAConfig(r=4)))
    args = trl.SFTConfig(output_dir=str(tmp_path / "out"), **COMMON)
    trl.SFTTrainer(bound, args=args, train_dataset=data, processing_class=tokenizer).train()
    saved = ll.load(tmp_path / "out/checkpoint-2", model)
    assert all(
        torch.equal(a, b) for a, b in zip(leaves(saved), leaves(ll.unbind(bound)), strict=True)
    )


def test_dpo_starts_from_a_loss_of_log_two(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """A policy that is its own reference prefers nothing, whatever its adapter is by then."""
    import datasets
    import trl

    model, tokenizer = loaded
    rows = [{"prompt": "w3 w4", "chosen": " w5 w6", "rejected": " w7 w8"}] * 16
    policy: Any = ll.bind(model, moved(ll.init(model, ll.LoRAConfig(r=4)), size=0.3))
    before = leaves(ll.unbind(ll.reference(policy)))
    reference = ll.reference(policy)
    run = trl.DPOTrainer(
        policy,
        ref_model=reference,
        args=trl.DPOConfig(output_dir=str(tmp_path / "out"), **COMMON),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[1] < losses[0]
    after = leaves(ll.unbind(reference))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_grpo_with_its_own_start_as_reference(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    import datasets
    import trl

    model, tokenizer = loaded
    policy: Any = ll.bind(model, moved(ll.init(model, ll.LoRAConfig(r=4)), size=0.3))
    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4}
    run = trl.GRPOTrainer(
        policy,
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        args=trl.GRPOConfig(output_dir=str(tmp_path / "out"), beta=0.0, **{**COMMON, **sizes}),
        train_dataset=datasets.Dataset.from_list([{"prompt": "w3 w4"}] * 8),
        processing_class=tokenizer,
    )
    run.beta, run.ref_model = 0.1, ll.reference(policy)
    run.train()
    kl = [entry["kl"] for entry in run.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0.0, abs=1e-5)
    assert kl[1] > 0
    close(logits(run.ref_model), logits(run.ref_model), 0.0)
