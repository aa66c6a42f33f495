"""What a fine-tuning run leaves: a table on stdout, result.json, the learning curves as PNG."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lora_lite_func as ll

from ..measure.harness import machine, versions
from .checks import Fact
from .training import PAIRS, Run, Task

__all__ = ["plot", "spread", "table", "write_json"]


# -------------------------------------------------------------------------------------------- table
def table(task: Task, runs: Sequence[Run]) -> str:
    """The runs as lines of text, with a caption that says what each column is."""
    epochs = len(runs[0].scores)
    score = [f"{task.metric}, epoch 1" if e == 1 else str(e) for e in range(1, epochs + 1)]
    header = ["method", "trainable", "lr", *score, f"step / {task.baseline}", "saved MiB"]
    rows = [
        header,
        *(
            [run.method, f"{run.trainable:,}", _lr(task, run), *_scores(run), *_costs(run)]
            for run in runs
        ),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", *_caption(task, runs)])


def _lr(task: Task, run: Run) -> str:
    return f"{run.lr:g}" if run.params or run.head else "-"


def _scores(run: Run) -> list[str]:
    return [f"{score:.3f}" for score in run.scores]


def _costs(run: Run) -> list[str]:
    return [f"{run.step_ratio:.2f}x", f"{run.saved_mib:.1f}"]


def _caption(task: Task, runs: Sequence[Run]) -> list[str]:
    head = sum(t.numel() for t in runs[0].head.values())
    learned = f" (the head's {head} included)" if head else ""
    return [
        f"{task.metric}: on held-out data after each epoch. trainable: how many numbers are "
        f"learned{learned}. lr: peak, of the adapter.",
        f"step / {task.baseline}: median time of a whole training step (forward, backward, clip, "
        f"AdamW) over that of",
        f"  {task.reference}; both timed in turn on the same {PAIRS} batches.",
        "saved MiB: most over those batches of what the forward pass keeps for the backward "
        "pass, as distinct storages;",
        "  the base's weights, the adapter's and the head's don't count.",
    ]


# --------------------------------------------------------------------------------------------- json
def write_json(
    file: Path,
    task: Task,
    runs: Sequence[Run],
    facts: Sequence[Fact],
    arguments: dict[str, Any],
    seconds: float,
) -> None:
    """Versions, machine, arguments, the numbers of each method and the facts that were checked."""
    result = {
        "versions": {"lora_lite_func": ll.__version__, **versions()},
        "machine": machine(next(task.model.parameters()).device),
        "arguments": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in arguments.items()
        },
        "task": {"title": task.title, "metric": task.metric, "step_ratio_is_over": task.reference},
        "methods": {run.method: _numbers(run) for run in runs},
        "checks": [fact._asdict() for fact in facts],
        "seconds": round(seconds, 1),
    }
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _numbers(run: Run) -> dict[str, Any]:
    numbers = {
        "trainable": run.trainable,
        "lr": run.lr,
        "scores": [_finite(s) for s in run.scores],
        "losses": [_finite(loss) for loss in run.losses],
        "train_seconds": round(run.seconds, 2),
        "step_ms": _finite(run.step_ms),
        "step_ratio": _finite(run.step_ratio),
        "saved_mib": _finite(run.saved_mib),
    }
    return numbers | ({"config": repr(run.params.config)} if run.params else {})


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None  # JSON has no nan


# --------------------------------------------------------------------------------------------- plot
def plot(file: Path, task: Task, runs: Sequence[Run]) -> None:
    """Training loss over epochs, smoothed, and the held-out score after each; every line is
    labelled where it ends.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    epochs = len(runs[0].scores)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, max(4.4, 0.26 * len(runs))), layout="constrained"
    )
    for i, run in enumerate(runs):
        style = (
            {"color": "0.45", "linestyle": "--"}
            if not run.params
            else {"color": f"C{i - 1}", "linestyle": "-" if i <= 10 else "-."}
        )
        if run.losses:
            left.plot(*_smoothed(run.losses, epochs), **style, linewidth=1.6)
        right.plot(
            range(1, epochs + 1),
            run.scores,
            **style,
            marker="o",
            markersize=4,
            linewidth=1.6,
            clip_on=False,
        )
    left.set(
        xlabel="epoch",
        ylabel=f"training loss (mean of {_window(runs[-1].losses, epochs)} steps)",
        xlim=(0, epochs),
    )
    right.set(xlabel="epoch", ylabel=f"{task.metric} on held-out data", xticks=range(1, epochs + 1))
    left.set_xticks(range(epochs + 1))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25, linewidth=0.6)
    right.set_xlim(1.0 - 0.05 * epochs, epochs)
    _label(
        right,
        [(run.method, run.scores[-1], right.lines[i].get_color()) for i, run in enumerate(runs)],
        epochs,
    )
    figure.suptitle(task.title)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _window(losses: Sequence[float], epochs: int) -> int:
    return max(1, len(losses) // (6 * epochs))


def _smoothed(losses: Sequence[float], epochs: int) -> tuple[list[float], list[float]]:
    """Epochs and the mean loss of the last steps, as many as `_window` says."""
    width, per_epoch = _window(losses, epochs), len(losses) / epochs
    means = [sum(losses[i - width : i]) / width for i in range(width, len(losses) + 1)]
    return [(width + i) / per_epoch for i in range(len(means))], means


def _label(axis: Any, ends: Sequence[tuple[str, float, Any]], x: float) -> None:
    """Each line's name and last value to the right of its end, moved apart where they would
    overlap.
    """
    low, high = axis.get_ylim()
    shown = [(name, y, color) for name, y, color in ends if math.isfinite(y)]
    places = spread(
        [(y - low) / (high - low) for _, y, _ in shown], gap=min(0.055, 1.0 / len(ends))
    )
    for (name, y, color), place in zip(shown, places, strict=True):
        axis.annotate(
            f"{name}  {y:.3f}",
            xy=(x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            color=color,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.6,
                "alpha": 0.6,
                "shrinkA": 0,
                "shrinkB": 4,
            },
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The heights moved as little as needed to lie `gap` apart, in the same order.

    >>> spread([0.5, 0.5], gap=0.1)
    [0.45, 0.55]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[tuple[float, list[int]]] = []  # (middle, members from below)
    for i in order:
        groups.append((heights[i], [i]))
        while (
            len(groups) > 1
            and groups[-1][0] - groups[-2][0] < gap * (len(groups[-1][1]) + len(groups[-2][1])) / 2
        ):
            (middle, upper), (below, lower) = groups.pop(), groups.pop()
            n, m = len(upper), len(lower)
            groups.append(((middle * n + below * m) / (n + m), lower + upper))
    found = [0.0] * len(heights)
    for middle, members in groups:
        for k, i in enumerate(members):
            found[i] = middle + gap * (k - (len(members) - 1) / 2)
    return found
