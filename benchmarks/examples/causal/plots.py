"""A run's curves: training loss, held-out score, the gradient's norm. Needs matplotlib."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["curves", "drawn"]

COLOURS = {
    "light": {"ink": "#1f2328", "faint": "#6e7781", "line": "#0969da", "other": "#bc4c00"},
    "dark": {"ink": "#e6edf3", "faint": "#9198a1", "line": "#58a6ff", "other": "#f0883e"},
}
"""Those of the documents' drawings."""

Lines = Sequence[Mapping[str, Any]]


def drawn(folder: Path, log: Lines, looks: Lines, title: str) -> list[Path]:
    """curves-light.svg and curves-dark.svg in the folder; none where matplotlib isn't installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # of fonts not here
    files = []
    for theme in COLOURS:
        files.append(folder / f"curves-{theme}.svg")
        curves(files[-1], log, looks, title, theme)
    return files


def curves(file: Path, log: Lines, looks: Lines, title: str, theme: str) -> None:
    """Three panels over the steps. Transparent, so that it lies on a page of its theme."""
    from matplotlib import pyplot as plt

    look = COLOURS[theme]
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "curves",
        "font.family": ["DejaVu Sans", "Verdana", "sans-serif"],
        "font.size": 9,
        "text.color": look["ink"],
        "axes.labelcolor": look["ink"],
        "axes.edgecolor": look["faint"],
        "xtick.color": look["faint"],
        "ytick.color": look["faint"],
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.6), layout="constrained")
        steps = [line["step"] for line in log]
        losses = [line["loss"] for line in log]
        axes[0].plot(steps, losses, color=look["line"], alpha=0.35, linewidth=0.8)
        axes[0].plot(steps, _smoothed(losses), color=look["line"], linewidth=1.5, label="training")
        held = [line["step"] for line in looks]
        axes[0].plot(
            held,
            [line["loss"] for line in looks],
            "o-",
            color=look["other"],
            markersize=3,
            linewidth=1.2,
            label="validation",
        )
        axes[0].set(title="loss", yscale="log")
        axes[0].legend(frameon=False, labelcolor=look["ink"])
        axes[1].plot(
            held,
            [line["score"] for line in looks],
            "o-",
            color=look["other"],
            markersize=3,
            linewidth=1.2,
        )
        axes[1].set(title="right answers, validation", ylim=(-0.03, 1.03))
        axes[2].plot(steps, [line["grad_norm"] for line in log], color=look["line"], linewidth=0.8)
        axes[2].set(title="norm of the gradient", yscale="log")
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel("step")
        figure.suptitle(title, color=look["ink"])
        figure.savefig(file, transparent=True, metadata={"Date": None})
        plt.close(figure)


def _smoothed(values: Sequence[float]) -> list[float]:
    """The median of the last twentieth of all steps, at each."""
    width = max(1, len(values) // 20)
    return [statistics.median(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]
