"""The training loop of one adapter: steps, looks at the validation sample, checkpoints."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lora_lite_func as ll

from .checkpoint import read_state, write_state
from .evaluation import Outcome
from .job import Job
from .progress import Progress, progress
from .results import append_json_line, examples_text, json_lines
from .training import State, Trainer

__all__ = ["STATE", "Run", "fit", "restored"]

STATE, LOG, LOOKS, TEXTS = "state.pt", "log.jsonl", "looks.jsonl", "examples.jsonl"
BEST, LAST = "best.safetensors", "last.safetensors"


@dataclass
class Run:
    """A training under way.

    Attributes:
        job: base and examples.
        folder: where it writes.
        trainer: makes steps.
        state: what steps have made.
        best: {"step", "loss", "score"} of the best look so far; {} before the first.
    """

    job: Job
    folder: Path
    trainer: Trainer
    state: State
    best: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many there will be."""
        return self.trainer.recipe.steps

    @property
    def adapter(self) -> ll.Adapter:
        """The adapter as it is."""
        return self.trainer.adapter(self.state)


def fit(run: Run) -> bool:
    """Train to the end, or to an interrupt, at which the state is written; whether it came to the
    end.
    """
    args = run.job.args
    look_every = args.eval_every or math.ceil(run.steps / 4)
    save_every = args.save_every or look_every
    with progress(args.method, run.steps, run.state.step) as bar:
        try:
            if run.state.step == 0:
                _look(run, bar)
            run.job.model.train()
            while run.state.step < run.steps:
                _step(run, bar)
                done = run.state.step
                if done % look_every == 0 or done == run.steps:
                    _look(run, bar)
                    run.job.model.train()
                if done % save_every == 0 or done == run.steps:
                    write_state(run.folder / STATE, run.state, run.best)
                if done == args.stop_at:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            write_state(run.folder / STATE, run.state, run.best)
            bar.say(f"stopped after step {run.state.step}; go on: --resume {run.folder}")
            return False
        finally:
            run.job.model.eval()
    ll.save(run.adapter, run.folder / LAST)
    return True


def _step(run: Run, bar: Progress) -> None:
    rate = run.trainer.recipe.lr * run.trainer.factor(run.state.step)
    run.state, told = run.trainer(run.state)
    loss, norm = told.losses[0], told.norms[0]
    append_json_line(
        run.folder / LOG, {"step": run.state.step, "loss": loss, "grad_norm": norm, "lr": rate}
    )
    if not math.isfinite(loss):
        raise SystemExit(
            f"step {run.state.step}: the loss is {loss}; a smaller --lr, a longer --warmup or "
            f"--dtype float32 may help. What was written is in {run.folder}"
        )
    bar.step(f"loss {loss:.3f}")


def _look(run: Run, bar: Progress) -> None:
    """Score a sample of the validation examples; keep the adapter if it is the best so far."""
    args, step = run.job.args, run.state.step
    sample = run.job.valid[: args.eval_sample]
    outcome = run.job.evaluate(run.adapter, sample)
    found = {"step": step, "loss": outcome.loss, "score": outcome.score}
    append_json_line(run.folder / LOOKS, found)
    note_texts(run.folder, step, outcome)
    better = _is_better(found, run.best, args.best)
    if better:
        run.best = found
        ll.save(run.adapter, run.folder / BEST)
    mark = ", the best so far" if better else ""
    bar.say(
        f"step {step}: validation loss {outcome.loss:.4f}, {outcome.score:.3f} right{mark}\n"
        f"{examples_text(sample, outcome, args.examples)}"
    )


def note_texts(folder: Path, step: int, outcome: Outcome) -> None:
    """Append every generated text, and whether it is right."""
    for i, (text, right) in enumerate(zip(outcome.texts, outcome.right, strict=True)):
        line = {"step": step, "example": i, "text": text, "right": right}
        append_json_line(folder / TEXTS, line)


def _is_better(found: dict[str, Any], best: dict[str, Any], by: str) -> bool:
    """Between equal scores the loss decides."""
    if not best:
        return True
    if by == "score" and found["score"] != best["score"]:
        return bool(found["score"] > best["score"])
    return bool(found["loss"] < best["loss"])


def restored(run: Run) -> Run:
    """The run as its folder's checkpoint has it; lines of the log behind the checkpoint go."""
    run.state, run.best = read_state(run.folder / STATE, run.state, run.job.args.device)
    for name in (LOG, LOOKS, TEXTS):
        file = run.folder / name
        lines = [line for line in json_lines(file) if line["step"] <= run.state.step]
        file.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
    return run
