"""Figures as panels of one pair of axes: several in a PNG, or one as an SVG image that stands in a page.

Sizes are CSS pixels. Figures are drawn on white, whatever the page behind them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PAPER, INK, MUTED, RULE, BASE = "#ffffff", "#1c2127", "#5f6b78", "#dde1e6", "#a9b2bc"
ACCENT, WARM = "#1f5fa8", "#b8541a"

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
    """Draw panels of one size in a grid, at twice the pixel density, with a note centred below them."""
    rows = -(-len(panels) // columns)
    total = (panels[0].width * min(columns, len(panels)), panels[0].height * rows + (26 if note else 0))
    with mpl.rc_context(_STYLE):
        figure = Figure((total[0] / 72, total[1] / 72), facecolor=PAPER)
        for i, panel in enumerate(panels):
            panel.place(figure, i % columns * panel.width, i // columns * panel.height, total)
        figure.text(0.5, 12 / total[1], note, color=MUTED, ha="center", va="center")
        figure.savefig(path, dpi=144)
