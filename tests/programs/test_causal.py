"""The causal program from start to end, on a small model with random weights."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

import lora_lite_func as ll

pytest.importorskip("tqdm")
pytest.importorskip("transformers")

from benchmarks.examples import causal
from benchmarks.examples.causal import methods, models, options, progress, readings, results, sweep
from benchmarks.examples.causal.job import load, new_adapter, new_feed, recipe
from benchmarks.examples.causal.training import Recipe, Trainer, schedule_factor

pytestmark = pytest.mark.usefixtures("offline")
SHORT = ["--max-new-tokens", "6", "--eval-sample", "8", "--batch", "4", "--targets", "_proj$"]


@pytest.fixture
def words(base: Path, sums: Path, tmp_path: Path) -> list[str]:
    """A command line that takes seconds."""
    return ["--model", str(base), "--data", str(sums), "--out", str(tmp_path), *SHORT]


def runs(out: Path) -> list[Path]:
    return sorted(path for path in out.iterdir() if path.is_dir())


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------- start to end
def test_a_model_learns_and_everything_is_written(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    more = ["--steps", "24", "--lr", "0.02", "--weight-decay", "0.1", "--schedule", "linear"]
    assert causal.main([*words, *more, "--eval-every", "8"]) == 0
    (run,) = runs(tmp_path)
    log, looks = lines(run / "log.jsonl"), lines(run / "looks.jsonl")
    assert [line["step"] for line in log] == list(range(1, 25))
    assert [line["step"] for line in looks] == [0, 8, 16, 24]
    assert sum(line["loss"] for line in log[-5:]) < 0.8 * sum(line["loss"] for line in log[:5])
    assert min(look["loss"] for look in looks) < looks[0]["loss"]
    assert all(line["grad_norm"] > 0 for line in log)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert result["test_examples"] == 10
    assert result["loss"] < result["base_loss"]
    assert all(check["holds"] for check in result["checks"])
    best = min(looks, key=lambda look: look["loss"])
    assert result["best_step"] == best["step"]
    assert {"best.safetensors", "last.safetensors", "curves-dark.svg", "examples.jsonl"} < {
        file.name for file in run.iterdir()
    }
    printed = capsys.readouterr()
    assert "of 10 test examples: base 0." in printed.out
    assert printed.err.count("\n") == 1  # no terminal: the progress is one line
    assert "lora: 24/24 steps in" in printed.err


def test_a_second_run_replaces_nothing(words: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        assert causal.main([*words, "--steps", "1", "--no-baseline", "--limit", "8"]) == 0
    assert len(runs(tmp_path)) == 2
    with (tmp_path / "summary.tsv").open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    assert [row["folder"] for row in rows] == [str(run) for run in runs(tmp_path)]
    assert len({row["data"] for row in rows}) == 1
    assert rows[0]["commit"]
    assert float(rows[0]["peak_mib"]) > 1


@pytest.mark.parametrize("more", [[], ["--pack", "--accumulate", "2", "--set", "dropout=0.1"]])
def test_a_resumed_run_is_bit_equal(
    words: list[str], tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = [*words, "--steps", "6", "--save-every", "2", "--max-tokens", "24", *more]
    plan += ["--no-baseline"]
    assert causal.main([*plan, "--out", str(tmp_path / "whole")]) == 0
    assert causal.main([*plan, "--out", str(tmp_path / "parts"), "--stop-at", "3"]) == 130
    assert "stopped after step 3; go on: --resume" in capsys.readouterr().out
    ((whole,), (parts,)) = runs(tmp_path / "whole"), runs(tmp_path / "parts")
    assert causal.main(["--resume", str(parts)]) == 0
    first, second = (ll.load(run / "last.safetensors") for run in (whole, parts))
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert lines(whole / "log.jsonl") == lines(parts / "log.jsonl")
    assert lines(whole / "looks.jsonl") == lines(parts / "looks.jsonl")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_learns(words: list[str], tmp_path: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    more = ["--quantization", quantization, "--steps", "2", "--limit", "8", "--no-baseline"]
    assert causal.main([*words, *more, "--dtype", "float32"]) == 0
    log = lines(runs(tmp_path)[0] / "log.jsonl")
    assert all(line["grad_norm"] > 0 for line in log)


# ---------------------------------------------------------------------------------------- the steps
def steps(words: list[str], count: int = 3) -> list[torch.Tensor]:
    """The trained leaves after some steps."""
    job = load(options.arguments([*words, "--steps", "3", "--lr", "0.01"]))
    feed = new_feed(job)
    trainer = Trainer(job.model, new_adapter(job)[0], feed, recipe(job.args, feed))
    state = trainer.new()
    job.model.train()
    for _ in range(count):
        state, _ = trainer(state)
    return list(pytree.tree_leaves(state.trainable))


def test_accumulated_batches_and_checkpointing_change_nothing(words: list[str]) -> None:
    whole = steps([*words, "--batch", "8"])
    for more in (["--accumulate", "2"], ["--batch", "8", "--checkpointing"]):
        found = steps([*words, *more])
        for a, b in zip(whole, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_schedules_rise_and_fall_without_an_idle_step() -> None:
    factor = schedule_factor(Recipe(steps=100, lr=1.0))
    factors = [factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == 1.0
    assert 0.0 < factors[-1] < 1e-2


# ------------------------------------------------------------------------------------------- sweeps
def test_a_member_of_a_sweep_is_what_it_would_be_alone(words: list[str]) -> None:
    grid = ["--sweep", "lr=0.003,0.03", "r=2,4", "--steps", "3"]
    job = load(options.arguments([*words, *grid]))
    made = sweep.members(job)
    (group,) = sweep.groups(made, 16)
    together = sweep.trained(job, group)
    assert [m.name for m in together] == [
        "lr 0.003, r 2",
        "lr 0.003, r 4",
        "lr 0.03, r 2",
        "lr 0.03, r 4",
    ]
    for number in (1, 2):
        job.args.lr = made[number].rate
        feed = new_feed(job)
        trainer = Trainer(job.model, made[number].params, feed, recipe(job.args, feed))
        state = trainer.new()
        job.model.train()
        for _ in range(3):
            state, _ = trainer(state)
        alone = pytree.tree_leaves(trainer.adapter(state))
        for a, b in zip(alone, pytree.tree_leaves(together[number].params), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_what_does_not_stack_makes_groups(words: list[str]) -> None:
    job = load(options.arguments([*words, "--method", "hra", "--sweep", "r=2,4", "lr=0.01,0.02"]))
    assert [len(group) for group in sweep.groups(sweep.members(job), 16)] == [2, 2]
    assert [len(group) for group in sweep.groups(sweep.members(job), 1)] == [1] * 4


def test_a_sweep_prints_its_table_and_keeps_the_best(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert causal.main([*words, "--sweep", "lr=1e-4,0.02", "--steps", "12", "--limit", "16"]) == 0
    printed = capsys.readouterr().out
    assert "lr 0.02" in printed.split("<- best")[0].splitlines()[-1]
    assert "a step of 2 adapters:" in printed
    (run,) = runs(tmp_path)
    stack = ll.load(run / "stack-0.safetensors")
    assert ll.names(stack) == ("lr 1e-4", "lr 0.02")
    best = ll.load(run / "best.safetensors")
    pairs = zip(pytree.tree_leaves(best), pytree.tree_leaves(stack[1]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------------------------------- arguments
def test_a_method_gets_its_papers_layers_and_says_what_it_has_none_of() -> None:
    cfg, remarks = methods.config("ia3", r=4, alpha=2.0, layers=(0, -1))
    assert cfg.target_names == (r"self_attn\.(k_proj|v_proj)$",)
    assert cfg.layers == (0, -1)
    assert remarks == [
        "ia3 has no r; --r 4 is left out",
        "ia3 has no alpha; --alpha 2.0 is left out",
    ]
    cfg, remarks = methods.config("lora", r=4, settings={"rslora": True})
    assert (cfg.r, cfg.alpha, remarks) == (4, 8.0, [])
    with pytest.raises(SystemExit, match="LoRAConfig has no field 'rslroa'; did you mean 'rslora'"):
        methods.config("lora", settings={"rslroa": True})


def test_every_method_has_a_config_for_a_language_model(base: Path) -> None:
    model = models.load_model(base, device="cpu")
    for name in ll.variants():
        if name != "tokens":  # which ones, the user has to say
            settings = {"block_size": 16} if name == "c3a" else {}
            cfg, _ = methods.config(name, settings=settings)
            assert ll.targets(model, methods.fits(model, cfg, False)[0])


def test_layers_limits_and_lists_are_read() -> None:
    args = options.arguments(["--layers", "0,2-4,-1", "--limit", "9", "test=2"])
    assert readings.layers(args) == (0, 2, 3, 4, -1)
    assert readings.limits(args) == {"train": 9, "valid": 9, "test": 2}
    args = options.arguments(["--sweep", "lr=1e-4,3e-4", "r=8,32"])
    assert len(readings.grid(args)) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "drao"], "unknown method 'drao'; did you mean 'dora'?"),
        (["--data", "nowhere.jsonl"], "--data: expected numbers:LANGUAGE or a file"),
        (["--test", "nowhere"], "--test: expected a file"),
        (["--valid", "1.5"], "a part between 0 and 1"),
        (["--limit", "some=3"], "--limit: expected N or train=N"),
        (["--layers", "a"], "--layers: expected 0,2,8-11,-1"),
        (["--sweep", "lr"], "--sweep: expected lists such as"),
        (["--sweep", "r=1", "r=2"], "two lists of r"),
        (["--warmup", "2"], "expected a part of the steps"),
        (["--steps", "0"], "expected at least 1"),
    ],
)
def test_what_can_not_be_meant_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        options.arguments(words)
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------------------------- what is written
def test_other_columns_go_to_a_file_of_their_own(tmp_path: Path) -> None:
    names = [results.append_summary(tmp_path, row).name for row in ({"a": 1}, {"b": 2}, {"a": 3})]
    assert names == ["summary.tsv", "summary-2.tsv", "summary.tsv"]
    assert (tmp_path / "summary.tsv").read_text(encoding="utf-8") == "a\n1\n3\n"


def test_progress_is_one_line_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress("train", 3, done=1) as bar:
        bar.step("loss 2")
        bar.step("loss 1")
    err = capsys.readouterr().err
    assert err.startswith("train: 3/3 steps in 0 s")
    assert err.endswith(", loss 1\n")
    assert err.count("\n") == 1
