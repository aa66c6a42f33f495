"""The documents' drawings, each as SVG for light and for dark pages.

python -m benchmarks.pictures     draws them where they stand   (needs matplotlib)

call   how `ll.apply` goes through a model
rows   how a batch whose rows have adapters of their own goes through a layer
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PICTURES", "call", "drawn", "main", "rows"]

ROOT = Path(__file__).parent.parent
WIDTH = 840
"""Units of a drawing's width: pixels of a page on GitHub."""
SANS = ["DejaVu Sans", "Verdana", "sans-serif"]
MONO = ["DejaVu Sans Mono", "Menlo", "Consolas", "monospace"]
"""Words stay words in the SVG; the first of these is the widest, so that none outgrows its box."""


@dataclass(frozen=True)
class Theme:
    """Colours of one kind of page.

    Attributes:
        ink: words and arrows.
        faint: lines around what is frozen, and remarks.
        frozen: fill of what never changes.
        copy: fill of what lives for one call.
        adapters: fills that tell adapters apart, and the lines around them.
    """

    ink: str
    faint: str
    frozen: str
    copy: str
    adapters: tuple[tuple[str, str], ...]


THEMES = {
    "light": Theme(
        ink="#1f2328",
        faint="#6e7781",
        frozen="#eaeef2",
        copy="#ffffff",
        adapters=(("#ffe2c2", "#bc4c00"), ("#cfe8ff", "#0969da"), ("#d2f2d6", "#1a7f37")),
    ),
    "dark": Theme(
        ink="#e6edf3",
        faint="#9198a1",
        frozen="#2d333b",
        copy="#161b22",
        adapters=(("#5a3214", "#f0883e"), ("#12365e", "#58a6ff"), ("#163d20", "#3fb950")),
    ),
}


class Drawing:
    """Boxes, words and arrows on a page of WIDTH x height units, y downwards."""

    def __init__(self, height: float, theme: Theme) -> None:
        from matplotlib import pyplot as plt

        self.theme = theme
        self.figure = plt.figure(figsize=(WIDTH / 100, height / 100), dpi=100)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")

    def box(self, x: float, y: float, w: float, h: float, fill: str, line: str, **how: Any) -> None:
        """A rounded box with its upper left corner at (x, y)."""
        from matplotlib.patches import FancyBboxPatch

        style = "round,pad=0,rounding_size=6"
        self.axes.add_patch(
            FancyBboxPatch(
                (x, y), w, h, style, facecolor=fill, edgecolor=line, linewidth=1.2, **how
            )
        )

    def words(self, x: float, y: float, text: str, size: float = 9.5, **how: Any) -> None:
        """Text, its left middle at (x, y) unless told otherwise."""
        style = {"fontsize": size, "color": self.theme.ink, "va": "center", "family": SANS}
        self.axes.text(x, y, text, **{**style, **how})

    def code(self, x: float, y: float, text: str, size: float = 9, **how: Any) -> None:
        """Text of a fixed width."""
        self.words(x, y, text, size, family=MONO, **how)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], **how: Any) -> None:
        """An arrow between two points."""
        style = {"arrowstyle": "-|>", "color": self.theme.ink, "linewidth": 1.3, "shrinkA": 0}
        self.axes.annotate(
            "", end, start, arrowprops={**style, "shrinkB": 0, "mutation_scale": 11, **how}
        )


# --------------------------------------------------------------------------------------------- call
def call(theme: Theme) -> Drawing:
    """model and params -> a copy of the tree for one call -> a site, from the inside."""
    page = Drawing(372, theme)
    fill, line = theme.adapters[0]
    _values(page, fill, line)
    _copy(page, fill, line)
    _site(page, fill, line)
    return page


def _values(page: Drawing, fill: str, line: str) -> None:
    theme = page.theme
    page.words(16, 20, "Two values", 11, weight="bold")
    page.box(16, 40, 216, 122, theme.frozen, theme.faint)
    page.code(28, 58, "model", weight="bold")
    page.words(84, 58, "a frozen function", 9, color=theme.faint)
    for i, row in enumerate(("Linear 16 → 32", "GELU", "Linear 32 → 8")):
        page.code(40, 86 + 26 * i, str(i))
        page.code(64, 86 + 26 * i, row)
    page.box(16, 186, 216, 148, fill, line)
    page.code(28, 204, "params", weight="bold")
    page.words(92, 204, "a pytree of tensors", 9, color=theme.faint)
    for i, row in enumerate(
        ("lora_A (8, 16)", "lora_B (32, 8)", "lora_A (8, 32)", "lora_B (8, 8)")
    ):
        page.code(40, 232 + 26 * i, ("0", "", "2", "")[i])
        page.code(64, 232 + 26 * i, row)


def _copy(page: Drawing, fill: str, line: str) -> None:
    theme = page.theme
    page.words(304, 20, "A copy for one call", 11, weight="bold")
    page.code(268, 106, "ll.apply", 8.5, ha="center", va="bottom")
    page.arrow((232, 112), (304, 130))
    page.arrow((232, 250), (304, 232))
    page.box(304, 40, 196, 294, theme.copy, theme.faint, linestyle=(0, (4, 3)))
    page.words(402, 58, "modules copied,", 9, color=theme.faint, ha="center")
    page.words(402, 74, "tensors shared", 9, color=theme.faint, ha="center")
    page.code(336, 96, "x", 10, ha="center", weight="bold")
    page.code(336, 312, "y", 10, ha="center", weight="bold")
    for i, name in enumerate(("Linear", "GELU", "Linear")):
        top = 108 + 62 * i
        page.box(328, top, 148, 44, theme.frozen, theme.faint)
        page.code(340, top + 22, str(i))
        page.code(368, top + 22, name)
        if i != 1:
            page.box(422, top + 8, 46, 28, fill, line)
            page.words(445, top + 22, "site", 8.5, ha="center")
    for top, end in ((86, 108), (152, 170), (214, 232), (276, 306)):
        page.arrow((352, top), (352, end))


def _site(page: Drawing, fill: str, line: str) -> None:
    theme = page.theme
    page.words(572, 20, "A site from the inside", 11, weight="bold")
    page.arrow((476, 130), (572, 130), linestyle=(0, (1, 2)), arrowstyle="-", color=theme.faint)
    page.box(572, 40, 252, 294, theme.copy, theme.faint)
    page.code(648, 58, "x", 10, ha="center", weight="bold")
    page.code(648, 318, "y", 10, ha="center", weight="bold")
    _phase(page, 88, "inputs", "x' from x", fill, line)
    _phase(page, 158, "frozen layer", "h = W x' + b", theme.frozen, theme.faint)
    _phase(page, 228, "outputs", "y from x and h", fill, line)
    for top, end in ((68, 88), (138, 158), (208, 228), (278, 308)):
        page.arrow((648, top), (648, end))
    page.box(734, 128, 80, 110, fill, line)
    page.code(774, 148, "prepare", 9, ha="center", weight="bold")
    for top, text in ((176, "what"), (192, "depends on"), (208, "params"), (224, "alone")):
        page.words(774, top, text, 8.5, ha="center")
    page.arrow((734, 142), (712, 124), color=line)
    page.arrow((734, 226), (712, 244), color=line)
    _caption(
        page,
        356,
        "After the call the copy is gone. Nothing was written on the model; gradients reach params "
        "and x alone.",
    )


def _caption(page: Drawing, y: float, text: str) -> None:
    page.words(WIDTH / 2, y, text, 9.5, ha="center", color=page.theme.faint)


def _phase(page: Drawing, top: float, name: str, what: str, fill: str, line: str) -> None:
    page.box(584, top, 128, 50, fill, line)
    page.code(648, top + 17, name, 9, ha="center", weight="bold")
    page.words(648, top + 35, what, 8.5, ha="center")


# --------------------------------------------------------------------------------------------- rows
def rows(theme: Theme) -> Drawing:
    """Rows of a batch, one pass of the frozen layer over all, each adapter's update on its rows."""
    page = Drawing(300, theme)
    page.words(16, 20, "A batch", 11, weight="bold")
    page.words(206, 20, "Sorted by adapter", 11, weight="bold")
    page.words(390, 20, "At each site: one product, an update per adapter", 11, weight="bold")
    page.code(92, 52, "ids", 9, ha="center")
    page.code(40, 52, "x", 9, ha="center")
    for i, number in enumerate(IDS):
        _row(page, 16, 66 + 34 * i, f"row {i}", number)
        page.code(92, 79 + 34 * i, str(number), 9, ha="center")
    order = sorted(range(len(IDS)), key=lambda i: IDS[i])
    for place, i in enumerate(order):
        _row(page, 248, 66 + 34 * place, f"row {i}", IDS[i])
        page.arrow(
            (116, 79 + 34 * i), (246, 79 + 34 * place), linewidth=1, color=_line(theme, IDS[i])
        )
    _segments(page, [IDS[i] for i in order])
    text = "Then each row goes back to its place. Row 1 has no adapter (-1, the bare base)."
    _caption(page, 284, text)
    return page


IDS = (1, -1, 0, 1, 0, 2)
"""Which adapter each row of the drawing has; -1 is the bare base."""


def _line(theme: Theme, number: int) -> str:
    return theme.faint if number < 0 else theme.adapters[number][1]


def _row(page: Drawing, x: float, y: float, text: str, number: int) -> None:
    fill = page.theme.frozen if number < 0 else page.theme.adapters[number][0]
    page.box(x, y, 56, 26, fill, _line(page.theme, number))
    page.words(x + 28, y + 13, text, 8.5, ha="center")


def _segments(page: Drawing, numbers: Sequence[int]) -> None:
    """The frozen layer over all rows, then a band for each run of like rows."""
    theme = page.theme
    page.box(390, 66, 118, 196, theme.frozen, theme.faint)
    page.code(449, 150, "frozen layer", 9, ha="center", weight="bold")
    page.words(449, 172, "x W^T + b", 9, ha="center")
    page.words(449, 190, "on every row", 8.5, ha="center", color=theme.faint)
    page.arrow((308, 164), (388, 164))
    page.arrow((508, 164), (560, 164))
    for number in dict.fromkeys(numbers):
        first, count = numbers.index(number), numbers.count(number)
        top, height = 66 + 34 * first, 34 * count - 8
        if number < 0:
            page.words(
                576, top + height / 2, "the bare base: nothing is added", 9, color=theme.faint
            )
            continue
        fill, line = theme.adapters[number]
        page.box(562, top, 262, height, fill, line)
        page.words(576, top + height / 2, f"adapter {number}: + s B A x on its {_rows(count)}", 9)


def _rows(count: int) -> str:
    return f"{count} rows" if count > 1 else "row"


PICTURES: dict[str, tuple[str, Callable[[Theme], Drawing]]] = {
    "call": (".github/pictures", call),
    "rows": ("lora_lite_func/guides", rows),
}
"""{name: (its folder, how it is drawn)}."""


def drawn(name: str, folder: Path, suffix: str = "svg") -> list[Path]:
    """A picture in each theme; returns the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = name  # the same file for the same drawing
    mpl.rcParams["svg.fonttype"] = "none"
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # of fonts not here
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for kind, theme in THEMES.items():
        page = PICTURES[name][1](theme)
        files.append(folder / f"{name}-{kind}.{suffix}")
        how = {"metadata": {"Date": None}} if suffix == "svg" else {"dpi": 100}
        page.figure.savefig(files[-1], transparent=True, **how)
        mpl.pyplot.close(page.figure)
    return files


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser("python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for PNGs, to look at")
    given = parser.parse_args(arguments)
    for name, (home, _) in PICTURES.items():
        files = drawn(name, given.out, "png") if given.out else drawn(name, ROOT / home)
        print(*files, sep="\n")


if __name__ == "__main__":
    main()
