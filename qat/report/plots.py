"""Figures as panels of one pair of axes: several in a PNG, or one as an SVG image in a page; the forest plot.

Sizes are CSS pixels. Figures are drawn on white, whatever the page behind them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PAPER, INK, MUTED, RULE, BASE = "#ffffff", "#1c2127", "#5f6b78", "#dde1e6", "#a9b2bc"
ACCENT, WARM = "#1f5fa8", "#b8541a"
_FAR = 4  # times as far out as the median row: a row that would squeeze all others

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qat",
    "font.size": 10.5,
    "font.sans-serif": ["DejaVu Sans", "Arial"],  # named once a text, so a short list
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.6,
}


@dataclass
class Panel:
    """One pair of axes: its title, its size and margins (left, right, top, bottom) in pixels, and what draws it."""

    title: str
    draw: Callable[[Axes], None]
    width: float = 430
    height: float = 250
    margins: tuple[float, float, float, float] = (56, 12, 32, 40)

    def place(self, figure: Figure, x: float, y: float, total: tuple[float, float]) -> None:
        """Draw into `figure` of `total` pixels, the panel's upper left corner at (x, y)."""
        left, right, top, bottom = self.margins
        width, height = self.width - left - right, self.height - top - bottom
        box = ((x + left) / total[0], 1 - (y + top + height) / total[1], width / total[0], height / total[1])
        axes = figure.add_axes(box)
        self.draw(axes)
        figure.text(box[0], 1 - (y + 13) / total[1], self.title, fontsize=11, fontweight="bold", va="center")


def svg(panel: Panel) -> str:
    """Return the panel as a data: URI of an SVG image."""
    text, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context(_STYLE):
        figure = Figure((panel.width / 72, panel.height / 72), facecolor=PAPER)
        panel.place(figure, 0, 0, (panel.width, panel.height))
        figure.savefig(text, format="svg", metadata=nothing)
    return "data:image/svg+xml," + quote(text.getvalue(), safe=" !'()*+,-./:;=")


def png(panels: Sequence[Panel], columns: int, path: Path, note: str = "") -> None:
    """Draw panels in a grid, at twice the pixel density, with a note centred below them."""
    width, height = (max(getattr(panel, side) for panel in panels) for side in ("width", "height"))
    rows = -(-len(panels) // columns)
    total = (width * min(columns, len(panels)), height * rows + (26 if note else 0))
    with mpl.rc_context(_STYLE):
        figure = Figure((total[0] / 72, total[1] / 72), facecolor=PAPER)
        for i, panel in enumerate(panels):
            panel.place(figure, i % columns * width, i // columns * height, total)
        figure.text(0.5, 12 / total[1], note, color=MUTED, ha="center", va="center")
        figure.savefig(path, dpi=144)


class Mark(NamedTuple):
    """Hold what a row of a forest shows: a value with its 95 % interval, how far above its row, in what style."""

    value: float
    ci: Sequence[float] | None = None
    shift: float = 0.0
    style: Mapping[str, Any] = {}


def forest(
    title: str,
    rows: Sequence[tuple[str, Sequence[Mark]]],
    unit: str,
    span: tuple[float, float] | None = None,
    margin: float = 0.0,
    dotted: float | None = None,
    row_height: float = 20,
) -> Panel:
    """Draw values with their intervals around zero, a labelled row each, the first on top.

    span: the ends of the axis; None: what all rows need but those far out. What is beyond it is an arrow at its end
    with the number beside it. margin: half the width of a band around zero. dotted: where a dotted line stands.
    """
    span = span or _span([mark for _, marks in rows for mark in marks], margin)

    def draw(axes: Axes) -> None:
        if margin:
            axes.axvspan(-margin, margin, color=RULE, alpha=0.6, linewidth=0)
        axes.axvline(0, color=BASE, linewidth=1.4)
        if dotted is not None:
            axes.axvline(dotted, color=MUTED, linewidth=1.0, linestyle=":")
        places = range(len(rows))[::-1]
        for y, (_, marks) in zip(places, rows, strict=True):
            for mark in marks:
                _draw_mark(axes, mark, y + mark.shift, span)
        axes.set_yticks(places, [label for label, _ in rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set(xlim=span, ylim=(-0.6, len(rows) - 0.4), xlabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")

    longest = max(len(label) for label, _ in rows)
    return Panel(title, draw, height=76 + row_height * len(rows), margins=(14 + 6.6 * longest, 12, 32, 40))


def _span(marks: Sequence[Mark], margin: float) -> tuple[float, float]:
    """Return the axis that zero, the margin and the marks need, but for marks far out."""
    ends = np.array([(0.0, 0.0, 0.0), *((mark.value, *(mark.ci or (mark.value, mark.value))) for mark in marks)])
    reach = np.abs(ends).max(axis=1)
    usual = np.quantile(reach[reach > 0], 0.5, method="lower") if reach.any() else 0.0
    near = ends[reach <= _FAR * usual]
    low, high = min(near.min(), -margin), max(near.max(), margin)
    pad = 0.05 * (high - low) or 1.0
    return float(low - pad), float(high + pad)


def _draw_mark(axes: Axes, mark: Mark, y: float, span: tuple[float, float]) -> None:
    style = {"marker": "o", "color": ACCENT, "markersize": 5, "linestyle": ""} | mark.style
    place = min(max(mark.value, span[0]), span[1])
    if mark.ci:
        axes.hlines(y, *mark.ci, color=style["color"], linewidth=1.3)
    if place != mark.value:
        marker, side, offset = (">", "right", -8) if mark.value > place else ("<", "left", 8)
        style |= {"marker": marker, "clip_on": False}
        where = {"xytext": (offset, 0), "textcoords": "offset points", "ha": side, "va": "center"}
        axes.annotate(f"{mark.value:+.3g}", (place, y), color=style["color"], fontsize=9, **where)
    axes.plot(place, y, **style)
