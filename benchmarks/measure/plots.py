"""Pictures of an adapter or of results.

python -m benchmarks.measure.plots ADAPTER_OR_RESULTS... --out FOLDER       (needs matplotlib)

An adapter's file (or PEFT folder) gives its updates' norms by layer and module as a heat map, and
their singular values. A result.json of benchmarks.examples.finetune gives learning curves, and
quality over number of parameters. What depends on the base (IA3, HRA ...) has no such picture.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_lite_func as ll
from lora_lite_func.cli.health import update_norm
from lora_lite_func.interop.open import open_adapter
from lora_lite_func.layers.roles import layer_index

_MOST = 12  # singular values of a site that are drawn


def drawn(source: Path, out: Path) -> list[Path]:
    """The pictures of a file; returns their paths.

    Raises:
        CheckpointError: it is neither an adapter nor results.
    """
    out.mkdir(parents=True, exist_ok=True)
    name = source.parent.name + "_" + source.stem if source.suffix else source.name
    if source.suffix == ".json" and source.name != "adapter_config.json":
        results = json.loads(source.read_text(encoding="utf-8"))
        return [
            curves(results, out / f"{name}_curves.png"),
            quality(results, out / f"{name}_quality.png"),
        ]
    params = open_adapter(source)
    parts = (
        [params]
        if isinstance(params, ll.Adapter)
        else list(params.values() if isinstance(params, Mapping) else params)
    )
    made = []
    for i, adapter in enumerate(parts):
        tail = f"_{i}" if len(parts) > 1 else ""
        if all(update_norm(adapter, path) is None for path in adapter):
            print(
                f"{source}: what {adapter.layout.variant.name} changes depends on the base (or "
                f"is a stack's); nothing to draw",
                file=sys.stderr,
            )
            continue
        made += [
            norms(adapter, out / f"{name}{tail}_norms.png"),
            spectra(adapter, out / f"{name}{tail}_spectra.png"),
        ]
    return made


# ----------------------------------------------------------------------------------------- adapters
def _modules(adapter: ll.Adapter) -> tuple[list[str], list[int]]:
    """(what follows the layer's number in the paths, the numbers)."""
    tails = {_tail(path): None for path in adapter}
    return list(tails), sorted({n for n in map(layer_index, adapter) if n is not None} or {0})


def _tail(path: str) -> str:
    parts = path.split(".")
    spot = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[spot + 1 :]) or path


def norms(adapter: ll.Adapter, file: Path) -> Path:
    """|W' - W| by layer and module, each cell with its number."""
    import matplotlib.pyplot as plt

    tails, layers = _modules(adapter)
    table = torch.full((len(tails), len(layers)), math.nan)
    for path in adapter:
        norm = update_norm(adapter, path)
        table[tails.index(_tail(path)), layers.index(layer_index(path) or 0)] = (
            math.nan if norm is None else norm
        )
    figure, axis = plt.subplots(
        figsize=(2.6 + 0.62 * len(layers), 1.5 + 0.42 * len(tails)), layout="constrained"
    )
    colours = plt.get_cmap("viridis").copy()
    colours.set_bad("0.85")
    image = axis.imshow(table.numpy(), cmap=colours, aspect="auto", vmin=0.0)
    axis.set_xticks(range(len(layers)), map(str, layers))
    axis.set_yticks(range(len(tails)), tails)
    axis.set_xlabel("layer")
    axis.set_title(f"{adapter.layout.variant.name}: norm of the update")
    middle = float(table.nan_to_num(0.0).max()) / 2
    for i in range(len(tails)):
        for j in range(len(layers)):
            value = float(table[i, j])
            if not math.isnan(value) and len(layers) <= 40:
                axis.text(
                    j,
                    i,
                    f"{value:.2g}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value < middle else "black",
                )
    figure.colorbar(image, ax=axis, shrink=0.9)
    return _saved(figure, file)


def _singular_values(adapter: ll.Adapter, path: str) -> Tensor | None:
    """Of a site's update; None where it depends on the base."""
    variant, site = adapter.layout.variant, adapter.sites[path]
    if update_norm(adapter, path) is None or variant.weight is None:
        return None
    held = {name: t.detach().float() for name, t in adapter[path].items()}
    update, _ = variant.weight(adapter.config, held, site, torch.zeros(site.d_out, site.d_in), None)
    return torch.linalg.svdvals(update)


def spectra(adapter: ll.Adapter, file: Path) -> Path:
    """The largest singular values of each update, a panel per module, a line per layer."""
    import matplotlib.pyplot as plt

    tails, layers = _modules(adapter)
    wide = min(len(tails), 3)
    high = -(-len(tails) // wide)
    figure, axes = plt.subplots(
        high,
        wide,
        figsize=(1.2 + 3.1 * wide, 0.6 + 2.4 * high),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    colours = plt.get_cmap("viridis")
    for i, axis in enumerate(axes.flat):
        axis.set_visible(i < len(tails))
        if i >= len(tails):
            continue
        for path in adapter:
            values = _singular_values(adapter, path) if _tail(path) == tails[i] else None
            if values is not None:
                n = layers.index(layer_index(path) or 0)
                top = values[: min(_MOST, max(adapter.sites[path].r, 2))]
                axis.plot(
                    range(1, len(top) + 1),
                    top,
                    color=colours(n / max(len(layers) - 1, 1)),
                    marker=".",
                    linewidth=1,
                )
        axis.set_title(tails[i], fontsize=9)
        axis.grid(alpha=0.3)
        if i % wide == 0:
            axis.set_ylabel("singular value")
        if i + wide >= len(tails):
            axis.set_xlabel("number")
    scale = plt.cm.ScalarMappable(plt.Normalize(layers[0], max(layers[-1], layers[0] + 1)), colours)
    figure.colorbar(scale, ax=axes, label="layer", shrink=0.8)
    figure.suptitle(f"{adapter.layout.variant.name}: singular values of the update")
    return _saved(figure, file)


# ------------------------------------------------------------------------------------------ results
def _rows(results: Any) -> list[Mapping[str, Any]]:
    methods = results.get("methods") if isinstance(results, Mapping) else None
    if not isinstance(methods, Mapping) or not methods:
        raise ll.CheckpointError(
            "expected the result.json of benchmarks.examples.finetune, which has methods"
        )
    return [{**numbers, "method": name} for name, numbers in methods.items()]


def _metric(results: Any) -> str:
    return str(results.get("task", {}).get("metric", "score"))


def curves(results: Any, file: Path) -> Path:
    """The score after each epoch, a line per method, its name at the end."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    rows = sorted(_rows(results), key=lambda row: row["scores"][-1])
    every = [score for row in rows for score in row["scores"]]
    apart, height = (max(every) - min(every) or 1.0) / 22, -math.inf
    for row in rows:
        scores, epochs = row["scores"], len(row["scores"])
        (line,) = axis.plot(range(1, epochs + 1), scores, marker="o", markersize=4)
        height = max(height + apart, scores[-1])  # names that would cover each other move up
        axis.text(
            epochs + 0.06 * epochs,
            height,
            row["method"],
            va="center",
            fontsize=8,
            color=line.get_color(),
        )
    most = max(len(row["scores"]) for row in rows)
    axis.set_xlim(1 - 0.1 * most, 1.35 * most)
    axis.set_xticks(range(1, most + 1))
    axis.set_xlabel("epoch")
    axis.set_ylabel(_metric(results))
    axis.grid(alpha=0.3)
    return _saved(figure, file)


def quality(results: Any, file: Path) -> Path:
    """The last score over the number of trainable parameters, a point per method."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for row in _rows(results):
        axis.scatter(row["trainable"], row["scores"][-1], s=24)
        axis.annotate(
            row["method"],
            (row["trainable"], row["scores"][-1]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axis.set_xscale("log")
    axis.margins(x=0.15, y=0.1)
    axis.set_xlabel("trainable parameters")
    axis.set_ylabel(_metric(results))
    axis.grid(alpha=0.3)
    return _saved(figure, file)


def _saved(figure: Any, file: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file


def main() -> int:
    """Draw; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("plots"))
    given = parser.parse_args()
    try:
        import matplotlib as mpl
    except ImportError:
        print("matplotlib isn't installed: pip install -e '.[demo]'", file=sys.stderr)
        return 1
    mpl.use("Agg")
    for source in given.sources:
        for file in drawn(source, given.out):
            print(file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
